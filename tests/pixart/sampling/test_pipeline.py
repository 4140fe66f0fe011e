"""The pipeline and its export, compared with sampling by `denoise`."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from pixart.data.encoders.text_encoder import TextEncoder, load_text_model, text_dim
from pixart.data.encoders.vae import load_vae
from pixart.model.dit import DiT
from pixart.sampling.denoise import denoise, make_scheduler
from pixart.sampling.pipeline import PixArtPipeline

SIZES = {"in_dim": 16, "dim": 32, "cond_dim": 16, "num_heads": 2, "num_blocks": 2, "base_image_size": 4}
MEAN, STD = tuple(0.1 * value for value in range(16)), tuple(1 + 0.1 * value for value in range(16))
STEPS = 3
TEXT = {"max_tokens": 12, "scale": 2.0}


def random_model(**kind: int) -> DiT:
    torch.manual_seed(0)
    model = DiT(**SIZES, **kind)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def make_pipeline(model: DiT, **parts) -> PixArtPipeline:
    return PixArtPipeline(
        transformer=model,
        vae=load_vae("demo"),
        latents_mean=MEAN,
        latents_std=STD,
        **{"scheduler": FlowMatchEulerDiscreteScheduler(), "sample_size": 4, **parts},
    )


@pytest.fixture(scope="module")
def texts() -> PixArtPipeline:
    tokenizer, encoder = load_text_model("minilm")
    parts = {"tokenizer": tokenizer, "text_encoder": encoder}
    return make_pipeline(random_model(text_dim=text_dim("minilm")), **parts, text_tokens=12, text_scale=2.0)


@pytest.fixture(scope="module")
def classes() -> PixArtPipeline:
    return make_pipeline(random_model(num_classes=4), id2label={"0": "circle", "1": "square", "2": "star"})


def latents(pipeline: PixArtPipeline, *prompt, guidance: float = 3.0, seeds=(5, 9), **options) -> torch.Tensor:
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(
        *prompt,
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        generator=generator,
        output_type="latent",
        **options,
    ).images


def noise(*seeds: int) -> torch.Tensor:
    return torch.stack([torch.randn(16, 4, 4, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


PROMPTS = ["a red circle", "a longer text about a blue square"]


def expected_latents(model: DiT, guidance: float = 3.0) -> torch.Tensor:
    encoder = TextEncoder("minilm", **TEXT)
    (text, mask), (null, null_mask) = encoder.encode(PROMPTS), encoder.encode([""] * 2)
    return denoise(
        model,
        {"text": text, "text_mask": mask},
        {"text": null, "text_mask": null_mask},
        noise(5, 9),
        steps=STEPS,
        guidance=guidance,
    )


def test_pipeline_equals_denoise(texts):
    for guidance in (1.0, 3.0):
        assert torch.allclose(
            latents(texts, PROMPTS, guidance=guidance), expected_latents(texts.transformer, guidance), atol=1e-5
        )


def test_exported_pipeline_gives_the_same_samples(texts, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    texts.save_pretrained(first)
    loaded = DiffusionPipeline.from_pretrained(first, trust_remote_code=True)
    loaded.save_pretrained(second)
    again = DiffusionPipeline.from_pretrained(second, custom_pipeline=str(second), trust_remote_code=True)
    expected = expected_latents(texts.transformer)
    for pipeline in (loaded, again):
        assert type(pipeline).__name__ == "PixArtPipeline"
        assert not type(pipeline).__module__.startswith("pixart.")
        assert torch.allclose(latents(pipeline, PROMPTS), expected, atol=1e-5)
        assert not torch.allclose(latents(pipeline, PROMPTS[::-1]), expected, atol=1e-3)
    image = again("a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (32, 32)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        DiffusionPipeline.from_pretrained(first)


@pytest.mark.slow
def test_exported_pipeline_loads_in_a_new_process(classes, tmp_path):
    classes.save_pretrained(tmp_path / "export")
    code = f"""
import torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained({str(tmp_path / "export")!r}, trust_remote_code=True)
generator = [torch.Generator().manual_seed(seed) for seed in (5, 9)]
images = pipeline(class_labels=["square", 2], num_inference_steps={STEPS}, guidance_scale=3.0, generator=generator,
                  output_type="latent").images
torch.save(images, {str(tmp_path / "images.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    expected = latents(classes, class_labels=["square", 2])
    assert torch.allclose(torch.load(tmp_path / "images.pt", weights_only=True), expected, atol=1e-5)
    index = json.loads((tmp_path / "export/model_index.json").read_text())
    assert index["text_encoder"] == [None, None]


def test_class_guidance_uses_the_null_class(classes):
    model = classes.transformer
    label, null = {"label": torch.tensor([1, 3])}, {"label": torch.tensor([3, 3])}
    expected = denoise(model, label, null, noise(5, 9), steps=STEPS, guidance=3.0)
    assert torch.allclose(latents(classes, class_labels=["square", "none"]), expected, atol=1e-5)
    unguided = denoise(model, label, null, noise(5, 9), steps=STEPS, guidance=1.0)
    assert not torch.allclose(expected[0], unguided[0], atol=1e-3)
    assert torch.allclose(expected[1], unguided[1], atol=1e-4)  # the null class serves as its null conditioning


def test_images_do_not_depend_on_their_batch(texts):
    both, second = latents(texts, PROMPTS), latents(texts, PROMPTS[1], seeds=(9,))
    assert torch.allclose(both[1], second[0], atol=1e-5)
    two = latents(texts, PROMPTS[1], seeds=(4, 9), num_images_per_prompt=2)
    assert torch.allclose(two[1], second[0], atol=1e-5)


def test_invalid_arguments_are_errors(texts, classes):
    for pipeline, options, message in (
        (texts, {"class_labels": 1}, "stage 2; pass only prompt"),
        (texts, {}, "stage 2; pass only prompt"),
        (classes, {"prompt": "a star"}, "stage 1; pass only class_labels"),
        (classes, {"class_labels": 4}, "class 4 does not exist; the model has classes 0 to 2 and none"),
        (classes, {"class_labels": "dog"}, "class 'dog'"),
        (classes, {"class_labels": 1, "output_type": "np"}, "output_type='np'"),
        (classes, {"class_labels": 1, "generator": []}, "0 generators for 1 images"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline(**options)


def test_encoder_decoder_text_model_is_exported_completely(tmp_path):
    from transformers import AutoModel, T5GemmaConfig, T5GemmaModuleConfig

    tokenizer, _ = load_text_model("minilm")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    module = T5GemmaModuleConfig(**sizes)
    text_model = AutoModel.from_config(T5GemmaConfig(encoder=module, decoder=module, vocab_size=len(tokenizer))).eval()
    text_model.save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    name = str(tmp_path / "text")
    model = random_model(text_dim=text_dim(name))
    parts = {"tokenizer": tokenizer, "text_tokens": 12}
    make_pipeline(model, text_encoder=load_text_model(name)[1], **parts).save_pretrained(tmp_path / "export")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "export", trust_remote_code=True)
    encoder = TextEncoder(name, max_tokens=12, scale=1.0).model
    expected = latents(make_pipeline(model, text_encoder=encoder, **parts), PROMPTS)
    assert torch.allclose(latents(loaded, PROMPTS), expected, atol=1e-5)
    assert not torch.allclose(latents(loaded, PROMPTS[::-1]), expected, atol=1e-3)


def test_a_size_is_sampled_with_the_shift_of_its_area(classes):
    shifted = make_pipeline(classes.transformer, shift_by_area=True)
    actual = latents(shifted, class_labels=[0], height=64, width=128, seeds=(5,))
    start = torch.randn(16, 8, 16, generator=torch.Generator().manual_seed(5))[None]
    shift = math.sqrt(8 * 16) / 4
    label, null = {"label": torch.tensor([0])}, {"label": torch.tensor([3])}
    expected = denoise(
        classes.transformer, label, null, start, steps=STEPS, guidance=3.0, scheduler=make_scheduler(shift)
    )
    assert actual.shape == (1, 16, 8, 16)
    assert torch.allclose(actual, expected, atol=1e-5)
    unshifted = denoise(classes.transformer, label, null, start, steps=STEPS, guidance=3.0)
    assert torch.allclose(latents(classes, class_labels=[0], height=64, width=128, seeds=(5,)), unshifted, atol=1e-5)
    assert not torch.allclose(actual, unshifted, atol=1e-2)
    for name, side in (("height", 8), ("width", 100), ("width", 0)):
        with pytest.raises(ValueError, match=f"{name}={side}: must be a positive multiple of 16"):
            latents(classes, class_labels=[0], seeds=(5,), **{name: side})


def test_an_exported_pipeline_of_a_shape_shifts_and_takes_sizes(classes, tmp_path):
    pipeline = make_pipeline(classes.transformer, sample_size=(4, 8), shift_by_area=True, scheduler=make_scheduler(1.5))
    pipeline.save_pretrained(tmp_path / "export")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "export", trust_remote_code=True)
    assert json.loads((tmp_path / "export/scheduler/scheduler_config.json").read_text())["shift"] == 1.5
    for size in ({}, {"height": 64, "width": 32}):
        expected = latents(pipeline, class_labels=[1], seeds=(2,), **size)
        assert torch.equal(latents(loaded, class_labels=[1], seeds=(2,), **size), expected)
    assert latents(loaded, class_labels=[1], seeds=(2,)).shape == (1, 16, 4, 8)
