"""The model with all that a picture needs, as a diffusers pipeline: the suite samples by it, and exports it.

    pipeline = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)  # where the suite is installed
    pipeline("a red circle", num_inference_steps=20, guidance_scale=4.5).images[0]

The folder's `pipeline.py`, which diffusers runs only where it is told to, names the class of this file.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pixart.checkpoint.normalization import Normalization
from pixart.data.encoders.text_encoder import Encoder
from pixart.data.encoders.vae import decode
from pixart.demo.patch_vae import PatchAutoencoder
from pixart.model.dit import DiT, null_labels
from pixart.sampling.denoise import denoise

MODULE = "pipeline"  # the folder's file, without its suffix
NO_CLASS = "none"
Prompts = str | list[str]
Classes = int | str | list[int | str]
Condition = dict[str, Tensor]  # keyword arguments of the model


class PixArtPipeline(DiffusionPipeline):
    """Pictures of prompts (stage 2) or of classes (stage 1, which has neither text encoder nor tokenizer).

    `latents_mean` and `latents_std`, one a channel, are the normalization that the transformer was trained with;
    `sample_size` is the latents' side; `text_scale` multiplies the encoder's states of `text_tokens` tokens;
    `id2label` names the classes by their index.
    """

    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012 - diffusers declares it so

    def __init__(
        self,
        transformer: DiT,
        vae: AutoencoderKL | PatchAutoencoder,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        latents_mean: Sequence[float] = (0.0,),
        latents_std: Sequence[float] = (1.0,),
        sample_size: int = 32,
        text_tokens: int = 120,
        text_scale: float = 1.0,
        id2label: dict[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(
            latents_mean=list(latents_mean),
            latents_std=list(latents_std),
            sample_size=sample_size,
            text_tokens=text_tokens,
            text_scale=text_scale,
            id2label=id2label or {},
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompts | None = None,
        *,
        class_labels: Classes | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 4.5,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """`images`: PIL images, or with `output_type="latent"` normalized latents (B, C, side, side).

        Stage 2 takes prompts, stage 1 classes by index, name or `none`. With a list of generators, one for each
        picture, a picture depends on its own alone. Raises ValueError naming the argument that does not fit.
        """
        if output_type not in ("pil", "latent"):
            raise ValueError(f"output_type={output_type!r}: must be pil or latent")
        condition, null = self.conditions(prompt, class_labels, num_images_per_prompt)
        count = len(next(iter(condition.values())))
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators for {count} pictures: give one for each")
        side, channels = self.config.sample_size, self.transformer.config.in_dim
        latents = denoise(
            self.transformer,
            condition,
            null,
            randn_tensor((count, channels, side, side), generator=generator, device=self.transformer.device),
            steps=num_inference_steps,
            guidance=guidance_scale,
            scheduler=self.scheduler,
        )
        if output_type == "latent":
            return ImagePipelineOutput(images=latents)
        images = decode(self.vae, self.normalization.undo(latents))
        return ImagePipelineOutput(images=[Image.fromarray(image) for image in images])

    @property
    def normalization(self) -> Normalization:
        return Normalization(mean=tuple(self.config.latents_mean), std=tuple(self.config.latents_std))

    def conditions(
        self, prompt: Prompts | None, class_labels: Classes | None, each: int
    ) -> tuple[Condition, Condition]:
        """The model's arguments for all pictures, `each` of every prompt or class, and those of "none"."""
        stage = self.transformer.stage
        if stage == 1 and class_labels is not None and prompt is None:
            return self.of_classes([item for item in listed(class_labels) for _ in range(each)])
        if stage == 2 and prompt is not None and class_labels is None:
            return self.of_text([item for item in listed(prompt) for _ in range(each)])
        raise ValueError(f"the model is of stage {stage}: give {'class_labels' if stage == 1 else 'prompt'} alone")

    def of_classes(self, asked: list[int | str]) -> tuple[Condition, Condition]:
        device = self.transformer.device
        label = torch.tensor([self.label(item) for item in asked], device=device)
        return {"label": label}, {"label": null_labels(self.transformer, len(asked), device)}

    def of_text(self, prompts: list[str]) -> tuple[Condition, Condition]:
        device, config = self.transformer.device, self.config
        encoder = Encoder(self.tokenizer, self.text_encoder, tokens=config.text_tokens, scale=config.text_scale)
        states, mask = encoder.encode([*prompts, ""])
        states, mask, count = states.to(device), mask.to(device), len(prompts)
        none = {"text": states[-1:].expand(count, -1, -1), "text_mask": mask[-1:].expand(count, -1)}
        return {"text": states[:-1], "text_mask": mask[:-1]}, none

    def label(self, asked: int | str) -> int:
        """The index of a class by its index, its name or `none`. Raises ValueError for one that is not there."""
        names, none = self.config.id2label, self.transformer.config.num_classes - 1
        index = next((int(key) for key, name in names.items() if name == asked), none if asked == NO_CLASS else asked)
        if not isinstance(index, int) or not 0 <= index <= none:
            raise ValueError(f"class {asked!r}: the model has classes 0 to {none - 1} and {none} for no class")
        return index

    def save_pretrained(self, save_directory: str | Path, **options) -> None:
        """As diffusers does, with the file that lets `DiffusionPipeline.from_pretrained` find this class."""
        super().save_pretrained(save_directory, **options)
        folder = Path(save_directory)
        (folder / f"{MODULE}.py").write_text(f"from {__name__} import {type(self).__name__}  # noqa: F401\n")
        index = folder / self.config_name
        content = json.loads(index.read_text())
        index.write_text(json.dumps({**content, "_class_name": [MODULE, type(self).__name__]}, indent=2) + "\n")


def listed(value):
    return value if isinstance(value, list) else [value]
