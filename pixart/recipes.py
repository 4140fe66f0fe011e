"""Recipes: each is a function that returns a whole configuration.

Imports neither torch nor anything heavy, so that the launcher may read it.
"""

from collections.abc import Callable
from typing import Any

from pixart.config.audit import AuditConfig
from pixart.config.dataset import DataConfig
from pixart.config.model import ModelConfig
from pixart.config.recipe import Recipe
from pixart.config.sampling import SampleConfig
from pixart.config.training import TrainConfig

# Standard deviation of MiniLM's last hidden states over the demo's captions; dividing by it brings the text to
# the scale of the image tokens.
MINILM_STATE_STD = 0.35

DEMO_TRAINING: dict[str, Any] = {
    **{
        "global_batch_size": 64,
        "lr": 6e-3,
        "warmup_steps": 40,
        "min_lr_ratio": 0.05,
        "ema_decay": 0.99,
        "precision": "fp32",
        "log_every": 5,
    },
    **{"validate_every": 100, "num_validation_samples": 64, "preview_every": 100},
}
XL_TRAINING: dict[str, Any] = {
    **{
        "global_batch_size": 2048,
        "lr": 1e-4,
        "warmup_steps": 1000,
        "weight_decay": 0.03,
        "activation_checkpointing": "selective",
    },
    **{"compile": True},
    **{"validate_every": 1000, "num_validation_samples": 4096, "preview_every": 1000, "keep_every": 50_000},
}


def demo(home: str) -> Recipe:
    """Rendered scenes at 64 px and a model that two CPU cores train in minutes: the embedded default."""
    return Recipe(
        name="demo",
        data=DataConfig(
            path=f"{home}/datasets/demo",
            source="demo",
            num_shards=256,
            max_images=4096,
            image_size=64,
            normalization="scalar",  # the demo's VAE has weighted its channels by what they matter for the picture
            max_text_tokens=32,
            text_scale=1 / MINILM_STATE_STD,
            store_text_embeddings=True,
        ),
        audit=AuditConfig(max_duplicates=1, max_same_opening=1),  # scenes of a few shapes are much alike
        model=ModelConfig(dim=128, cond_dim=128, num_heads=4, num_blocks=4, base_latent_size=8, num_classes=5),
        stage1=TrainConfig(steps=300, **DEMO_TRAINING),
        stage2=TrainConfig(steps=800, fp8=True, **DEMO_TRAINING),
        sample=SampleConfig(steps=20, guidance=2.0, count=64),
    )


def xl(home: str) -> Recipe:
    """The real run: PixArt-alpha XL/2 at 256 px on SD3 latents, captions by Qwen3-VL, stage 2 in FP8.

    Set `data.source` to the images; the other values are those of the user's BF16 stage 1 and of PixArt-alpha.
    """
    return Recipe(
        name="xl",
        data=DataConfig(
            path=f"{home}/datasets/xl",
            source="",
            num_shards=256,  # some minutes of work each, for which a task starts its engine once
            vae="stabilityai/stable-diffusion-3-medium-diffusers/vae",
            text_encoder="google/t5gemma-xl-xl-ul2",
            captioner="vllm",
        ),
        audit=AuditConfig(),
        model=ModelConfig(),
        stage1=TrainConfig(steps=400_000, **XL_TRAINING),
        stage2=TrainConfig(steps=300_000, fp8=True, **XL_TRAINING),
        sample=SampleConfig(),
    )


DEFAULT_RECIPE = "demo"
RECIPES: dict[str, Callable[[str], Recipe]] = {"demo": demo, "xl": xl}
