"""Recipes: each is a function that returns the complete configuration of a run.

Imports nothing heavy, so that the launcher can use it.
"""

import dataclasses
from collections.abc import Callable

from pixart.config.audit import AuditConfig
from pixart.config.dataset import DataConfig
from pixart.config.model import ModelConfig
from pixart.config.recipe import Recipe
from pixart.config.sampling import SampleConfig
from pixart.config.training import TrainConfig

# Standard deviation of MiniLM's last hidden states over the demo's captions; dividing by it scales the text embeddings
# like the image tokens.
MINILM_STATE_STD = 0.35


def demo(home: str) -> Recipe:
    """Return the default recipe: rendered scenes at 64 pixels, and a model that two CPU cores train in minutes."""
    stage1 = TrainConfig(
        steps=300,
        global_batch_size=64,
        lr=6e-3,
        warmup_steps=40,
        min_lr_ratio=0.05,
        ema_decay=0.99,
        precision="fp32",
        log_every=5,
        validate_every=100,
        num_validation_samples=64,
        preview_every=100,
    )
    return Recipe(
        name="demo",
        data=DataConfig(
            path=f"{home}/datasets/demo",
            source="demo",
            num_shards=256,
            max_images=4096,
            image_size=64,
            normalization="scalar",  # the demo's VAE weights its channels by their importance for the image
            max_text_tokens=32,
            text_scale=1 / MINILM_STATE_STD,
            store_text_embeddings=True,
        ),
        audit=AuditConfig(max_duplicates=1.0, max_same_opening=1.0),  # scenes of a few shapes are much alike
        model=ModelConfig(dim=128, cond_dim=128, num_heads=4, num_blocks=4, base_latent_size=8, num_classes=5),
        stage1=stage1,
        stage2=dataclasses.replace(stage1, steps=800, fp8=True),
        sample=SampleConfig(steps=20, guidance=2.0, count=64),
    )


def xl(home: str) -> Recipe:
    """Return the recipe of a full-scale run: PixArt-alpha XL/2 at 256 pixels on SD3 latents, stage 2 in FP8.

    Captions are by Qwen3-VL. `data.source` must be set to the images. Hyperparameters are those of PixArt-alpha
    (Chen et al., 2023, arXiv:2310.00426) and of the BF16 stage 1 that the suite was written to continue.
    """
    stage1 = TrainConfig(
        steps=400_000,
        global_batch_size=2048,
        lr=1e-4,
        warmup_steps=1000,
        weight_decay=0.03,
        compile=True,
        activation_checkpointing="selective",
        keep_every=50_000,
        validate_every=1000,
        num_validation_samples=4096,
        preview_every=1000,
    )
    return Recipe(
        name="xl",
        data=DataConfig(
            path=f"{home}/datasets/xl",
            source="",
            num_shards=256,  # minutes of captioning each, so that the engine's start does not dominate
            vae="stabilityai/stable-diffusion-3-medium-diffusers/vae",
            text_encoder="google/t5gemma-xl-xl-ul2",
            captioner="vllm",
        ),
        audit=AuditConfig(),
        model=ModelConfig(),
        stage1=stage1,
        stage2=dataclasses.replace(stage1, steps=300_000, fp8=True),
        sample=SampleConfig(),
    )


DEFAULT_RECIPE = "demo"
RECIPES: dict[str, Callable[[str], Recipe]] = {"demo": demo, "xl": xl}
