"""Recipes: each is a function that returns the complete configuration of a run.

Imports nothing heavy, so that the launcher can use it.
"""

import dataclasses
from collections.abc import Callable

from pixart.config.captions import visible_attributes
from pixart.config.dataset import AuditConfig, DataConfig
from pixart.config.model import ModelConfig
from pixart.config.recipe import Recipe
from pixart.config.sampling import EvaluationConfig, SampleConfig
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
        evaluation=EvaluationConfig(
            features="efficientnet-lite0:112",  # its Fréchet distance needs 113 images
            feature_image_size=64,
            num_prompts=256,
            num_shards=4,
            num_reference_images=1024,
        ),
    )


def xl(home: str) -> Recipe:
    """Return the recipe of a full-scale run: PixArt-alpha XL/2 at 256 pixels on SD3 latents, stage 2 in FP8.

    Captions are by Qwen3-VL. `data.source` must be set to the images. Sizes and weight decay are those of PixArt-alpha
    (Chen et al., 2023, arXiv:2310.00426); batch, lengths and the rest of the optimizer are this suite's.
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


def xl_mxfp8(home: str) -> Recipe:
    """Return the recipe of the original training: the same XL/2 model with a stage 2 in MXFP8 (E4M3), as it was run.

    Values are those of github.com/hachoj/Pixart-Alpha-From-Scratch at its commit of 8 January 2026, in the files named
    below; `data.source` must be set to the images. Its stage 2 runs on 8 B200s, and needs TransformerEngine.
    """
    stage1 = TrainConfig(
        steps=300_000,  # configs/train/stage1.yaml
        global_batch_size=512,  # 128 on each of 4 GPUs: stage1.yaml, boiler_b200.slurm of the commit "training stage 1"
        lr=1e-4,  # stage1.yaml and stage2.yaml
        warmup_steps=0,  # their 2000 are read by no scheduler: train_stage1.py and train_stage2.py keep `lr` constant
        weight_decay=0.03,  # stage1.yaml and stage2.yaml
        beta2=0.999,  # torch's default for AdamW, which train_stage1.py and train_stage2.py leave
        max_grad_norm=None,  # train_stage1.py does not clip; train_stage2.py clips to infinity
        ema_decay=0.9999,  # 0.99 every 100 steps, stage1.yaml and stage2.yaml: 0.99 ** (1 / 100) for each step
        cond_dropout_prob=0.1,  # `cfg_p` of stage1.yaml
        seed=42,  # stage1.yaml and stage2.yaml
        compile=True,  # train_stage1.py and train_stage2.py
        save_every=1000,  # `every_n_checkpoint` of stage1.yaml and stage2.yaml
        keep_last=5,  # train_stage1.py and train_stage2.py
        preview_every=5000,  # `every_n_image` of stage1.yaml
        validate_every=1000,  # this suite's, as in `xl`
        num_validation_samples=4096,
    )
    stage2 = dataclasses.replace(
        stage1,
        steps=150_000,  # configs/train/stage2.yaml
        global_batch_size=10_240,  # 320 x 4 micro-batches x 8 GPUs: stage2.yaml, stage2.slurm
        gradient_accumulation_steps=4,  # `grad_accum` of stage2.yaml
        cond_dropout_prob=0.0,  # train_stage2.py drops no captions
        decay_qk_norm=True,  # te.RMSNorm of models_fp8 is no nn.RMSNorm, whose weights train_stage2.py exempts
        preview_every=1000,  # `every_n_image` of stage2.yaml
        fp8=True,
        fp8_recipe="mxfp8",  # MXFP8BlockScaling with E4M3, train_stage2.py
    )
    return Recipe(
        name="xl-mxfp8",
        data=DataConfig(
            path=f"{home}/datasets/xl-mxfp8",
            source="",
            num_shards=256,  # as in `xl`
            vae="stabilityai/stable-diffusion-3-medium-diffusers/vae",  # data/shard_imgnet_21_vllm.py
            pixel_range=(0, 1),  # data/shard_imgnet_21_vllm.py divides by 255 only
            normalization="scalar",  # `latent_mean` of stage1.yaml and stage2.yaml, and the VAE's scaling factor
            text_encoder="google/t5gemma-xl-xl-ul2",  # train_stage2.py
            max_text_tokens=120,  # MAX_TOKENS of data/shard_imgnet_21_vllm.py
            captioner="vllm",  # Qwen3-VL-2B-Instruct, data/shard_imgnet_21_vllm.py
            captions=visible_attributes(),
        ),
        audit=AuditConfig(),
        model=ModelConfig(),  # configs/model/ccdit.yaml and mmdit.yaml
        stage1=stage1,
        stage2=stage2,
        sample=SampleConfig(steps=24, guidance=1.0),  # train_stage2.py: 24 Euler steps, no guidance
    )


DEFAULT_RECIPE = "demo"
RECIPES: dict[str, Callable[[str], Recipe]] = {"demo": demo, "xl": xl, "xl-mxfp8": xl_mxfp8}
