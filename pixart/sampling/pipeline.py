"""The diffusers pipeline for sampling and export.

    pipeline = DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)
    pipeline("a red circle", num_inference_steps=20, guidance_scale=4.5).images[0]

An exported folder contains the code that it needs, see `pixart.sampling.export`, which copies this module into it.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
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
from pixart.sampling.export import write_code

MODULE = "pipeline"  # name of the Python module in an exported folder
NULL_CLASS = "none"  # class label for unconditional samples
Prompts = str | list[str]
Classes = int | str | list[int] | list[str] | list[int | str]
Conditioning = dict[str, Tensor]  # keyword arguments of the model


class PixArtPipeline(DiffusionPipeline):
    """Generates images of prompts (stage 2) or of classes (stage 1, without text encoder and tokenizer).

    `latents_mean` and `latents_std`, one value per channel, are the normalization that the transformer was trained
    with. `sample_size` is the side, or the height and width, of the latents of an image whose size is not given. The
    scheduler's shift is that of this size; with `shift_by_area`, it is proportional to the square root of the latents'
    area for another size. Prompts are padded to `text_tokens` tokens, and
    `text_scale` multiplies the text encoder's hidden states. `id2label` maps class indices to names. `pixel_range` is
    the range of pixel values that the VAE encoded the training images from.
    """

    _optional_components = ["text_encoder", "tokenizer"]  # noqa: RUF012 - declared like this in diffusers

    def __init__(
        self,
        transformer: DiT,
        vae: AutoencoderKL | PatchAutoencoder,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_encoder: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        latents_mean: Sequence[float] = (0.0,),
        latents_std: Sequence[float] = (1.0,),
        sample_size: int | Sequence[int] = 32,
        text_tokens: int = 120,
        text_scale: float = 1.0,
        id2label: dict[str, str] | None = None,
        pixel_range: Sequence[int] = (-1, 1),
        shift_by_area: bool = False,
    ) -> None:
        super().__init__()
        self.null_text: tuple[PreTrainedModel, tuple[Tensor, Tensor]] | None = None  # of the text encoder that made it
        self.register_modules(
            transformer=transformer, vae=vae, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer
        )
        self.register_to_config(
            latents_mean=list(latents_mean),
            latents_std=list(latents_std),
            sample_size=sample_size if isinstance(sample_size, int) else list(sample_size),
            text_tokens=text_tokens,
            text_scale=text_scale,
            id2label=id2label or {},
            pixel_range=list(pixel_range),
            shift_by_area=shift_by_area,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompts | None = None,
        *,
        class_labels: Classes | None = None,
        conditionings: tuple[Conditioning, Conditioning] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        guidance_scale: float = 4.5,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[["PixArtPipeline", int, Tensor, dict[str, Tensor]], object] | None = None,
    ) -> ImagePipelineOutput:
        """Generate PIL images, or with `output_type="latent"` normalized latents (B, C, h, w).

        `height` and `width` are in pixels, and multiples of the patch's side; the default is `sample_size`.

        Stage 2 takes prompts; stage 1 takes classes by index, by name or `none`. `conditionings`, which `conditioning`
        returns, replaces both. With a list of one generator per
        image, an image depends on its own generator only. `callback_on_step_end` is called, as in diffusers, with the
        pipeline, the step, the timestep and `{"latents": latents}`, of normalized latents that it cannot replace.
        Raises ValueError if an argument is invalid.
        """
        if output_type not in ("pil", "latent"):
            raise ValueError(f"output_type={output_type!r}: must be pil or latent")
        if conditionings is None:
            conditionings = self.conditioning(prompt, class_labels, num_images_per_prompt)
        conditioning, null_conditioning = conditionings
        count = len(next(iter(conditioning.values())))
        if isinstance(generator, list) and len(generator) != count:
            raise ValueError(f"generator: {len(generator)} generators for {count} images; pass one per image")

        def on_step(step: int, timestep: Tensor, latents: Tensor) -> None:
            if callback_on_step_end:
                callback_on_step_end(self, step, timestep, {"latents": latents})

        shape, channels = self.latent_size(height, width), self.transformer.config.in_dim
        latents = denoise(
            self.transformer,
            conditioning,
            null_conditioning,
            randn_tensor((count, channels, *shape), generator=generator, device=self.transformer.device),
            steps=num_inference_steps,
            guidance=guidance_scale,
            scheduler=self.scheduler_of(*shape),
            on_step=on_step,
        )
        return ImagePipelineOutput(images=latents if output_type == "latent" else self.decode_latents(latents))

    @property
    def default_latent_size(self) -> tuple[int, int]:
        """The height and width of the latents of an image whose size is not given."""
        size = self.config.sample_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def downsampling_factor(self) -> int:
        """Side of the image area that one latent pixel stands for, in pixels."""
        config = self.vae.config
        return config.patch_size if "patch_size" in config else 2 ** (len(config.block_out_channels) - 1)

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Return the height and width of the latents of an image of height x width pixels; None takes the default.

        Raises ValueError for a side that is no positive multiple of the patch's.
        """
        factor, sides = self.downsampling_factor, []
        multiple = factor * self.transformer.config.patch_size
        for name, side, default in zip(("height", "width"), (height, width), self.default_latent_size, strict=True):
            if side is not None and (side < 1 or side % multiple):
                raise ValueError(
                    f"{name}={side}: must be a positive multiple of {multiple}, the patch's side in pixels"
                )
            sides.append(default if side is None else side // factor)
        return sides[0], sides[1]

    def scheduler_of(self, height: int, width: int) -> FlowMatchEulerDiscreteScheduler:
        """Return the scheduler with the shift for latents of height x width."""
        if not self.config.shift_by_area or (height, width) == self.default_latent_size:
            return self.scheduler
        ratio = math.sqrt(height * width / math.prod(self.default_latent_size))
        return type(self.scheduler).from_config(self.scheduler.config, shift=self.scheduler.config.shift * ratio)

    def decode_latents(self, latents: Tensor) -> list[Image.Image]:
        """Decode normalized latents (B, C, h, w) to images."""
        images = decode(self.vae, self.normalization.undo(latents), self.normalization.pixel_range)
        return [Image.fromarray(image) for image in images]

    @property
    def normalization(self) -> Normalization:
        """The normalization of the latents."""
        low, high = self.config.pixel_range
        return Normalization(
            mean=tuple(self.config.latents_mean), std=tuple(self.config.latents_std), pixel_range=(low, high)
        )

    def conditioning(
        self, prompt: Prompts | None, class_labels: Classes | None, images_per_prompt: int
    ) -> tuple[Conditioning, Conditioning]:
        """Return the conditioning of all images and the null conditioning for guidance.

        Raises ValueError unless exactly the argument for the model's stage is given.
        """
        stage = self.transformer.stage
        if stage == 1 and class_labels is not None and prompt is None:
            return self.class_conditioning([item for item in as_list(class_labels) for _ in range(images_per_prompt)])
        if stage == 2 and prompt is not None and class_labels is None:
            return self.text_conditioning([item for item in as_list(prompt) for _ in range(images_per_prompt)])
        raise ValueError(f"the model has stage {stage}; pass only {'class_labels' if stage == 1 else 'prompt'}")

    def class_conditioning(self, classes: list[int | str]) -> tuple[Conditioning, Conditioning]:
        """Return the conditioning of the classes, `label` (B,), and the null conditioning."""
        device = self.transformer.device
        label = torch.tensor([self.class_index(item) for item in classes], device=device)
        return {"label": label}, {"label": null_labels(self.transformer, len(classes), device)}

    def text_conditioning(self, prompts: list[str]) -> tuple[Conditioning, Conditioning]:
        """Return the conditioning of the prompts and that of the empty text.

        Both have `text` (B, L, text_dim) and `text_mask` (B, L). Equal prompts are encoded once, and the empty text
        once for all calls.
        """
        device, config = self.transformer.device, self.config
        encoder = Encoder(self.tokenizer, self.text_encoder, max_tokens=config.text_tokens, scale=config.text_scale)
        if self.null_text is None or self.null_text[0] is not self.text_encoder:
            self.null_text = (self.text_encoder, encoder.encode([""]))
        null, null_mask = (tensor.to(device).expand(len(prompts), *tensor.shape[1:]) for tensor in self.null_text[1])
        distinct = list(dict.fromkeys(prompts))
        states, mask = (tensor.to(device) for tensor in encoder.encode(distinct))
        if len(distinct) < len(prompts):
            rows = [distinct.index(prompt) for prompt in prompts]
            states, mask = states[rows], mask[rows]
        return {"text": states, "text_mask": mask}, {"text": null, "text_mask": null_mask}

    def class_index(self, label: int | str) -> int:
        """Return the index of a class given by index, name or `none`. Raises ValueError for an unknown class."""
        names, null = self.config.id2label, self.transformer.config.num_classes - 1
        index = next((int(key) for key, name in names.items() if name == label), null if label == NULL_CLASS else label)
        if not isinstance(index, int) or not 0 <= index <= null:
            raise ValueError(f"class {label!r} does not exist; the model has classes 0 to {null - 1} and {NULL_CLASS}")
        return index

    def save_pretrained(self, save_directory: str | Path, **options) -> None:
        """Save like diffusers, with the code that `DiffusionPipeline.from_pretrained` needs to load the folder."""
        super().save_pretrained(save_directory, **options)
        folder = Path(save_directory)
        index = folder / self.config_name
        content = json.loads(index.read_text())
        for component, module in write_code(self, folder, suite_code(type(self))).items():
            content[component] = [module, type(getattr(self, component)).__name__]
        index.write_text(json.dumps({**content, "_class_name": [MODULE, type(self).__name__]}, indent=2) + "\n")


def suite_code(kind: type) -> Callable[[], dict[str, str]] | None:
    """Return a function that returns the code of an export; None for a class that comes from an exported folder."""
    if not kind.__module__.startswith("pixart."):
        return None
    from pixart.sampling.export import component_code, pipeline_code

    return lambda: {**component_code(), f"{MODULE}.py": pipeline_code(sys.modules[kind.__module__])}


def as_list(value):
    return value if isinstance(value, list) else [value]
