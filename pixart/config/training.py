"""One stage of training."""

from dataclasses import dataclass
from typing import Literal

from pixart.config.limits import require_at_least, require_share

# That follow a plan's recipe, the one to be taken first; TransformerEngine (te) needs a GPU.
FP8_BACKENDS = {"delayed": ("native",), "current": ("torchao", "te"), "rowwise": ("torchao",), "mxfp8": ("te",)}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One stage of training. The global batch does not depend on the number of ranks."""

    steps: int
    global_batch_size: int  # global batch, images
    lr: float
    warmup_steps: int  # steps of linear warm-up
    min_lr_ratio: float = 1.0  # cosine decay ends at this fraction of lr; 1: constant
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-15
    max_grad_norm: float = 1.0  # global gradient norm
    ema_decay: float = 0.9999
    cond_dropout_prob: float = 0.1  # share of conditions replaced by "none", for guidance
    short_caption_prob: float = 0.0  # share of short captions; stage 2, of a dataset with data.short_captions
    precision: Literal["bf16", "fp32"] = "bf16"
    fp8: bool = False  # needs a checkpoint that the conversion wrote
    fp8_backend: Literal["auto", "native", "torchao", "te"] = "auto"  # auto: by the recipe of the checkpoint's plan
    fp8_grad_weight: bool = True  # false: the native backend's third product stays in BF16
    seed: int = 0
    max_skipped_steps: int = 10  # steps in a row, left out as their gradient is not finite, after which training ends

    gradient_accumulation_steps: int = (
        1  # micro-batches, one after the other, of which a rank's part of the batch is made up
    )
    sharding: Literal["fsdp", "hsdp"] = "fsdp"  # hsdp: over the ranks of a node, with a replica on each node
    reshard_after_forward: bool = (
        True  # free a block's gathered weights after its forward pass: less memory, one gather more
    )
    compile: bool = False  # each block, by torch.compile; the text encoder too
    fused_adamw_ema: bool = False  # AdamW and the average of the weights as one compiled pass
    attention_backend: Literal["autotune", "default"] = (
        "autotune"  # on a GPU: the fastest kernel there, or torch's own choice
    )
    shard_text_encoder: bool = False  # where the dataset has no states of the text
    activation_checkpointing: Literal["none", "selective", "full"] = "none"  # selective: products are kept

    log_every: int = 10
    fp8_log_every: int = 100  # steps between two looks at the scales, of which there are thousands
    save_every: int = 1000
    keep_last: int = 3  # checkpoints
    keep_every: int = 0  # and those of steps that are multiples of this; 0: no more
    validate_every: int = 0  # steps; 0: never
    num_validation_samples: int = 0  # kept from training, the same ones in both stages; at most a tenth of the dataset
    preview_every: int = 0  # steps; 0: never
    num_previews: int = 8  # pictures
    hang_timeout_minutes: float = 10.0  # without a step, after which every rank prints its stacks
    profile_step: int = 0  # step with which a trace of three steps begins; 0: none

    def __post_init__(self) -> None:
        require_at_least(
            1,
            steps=self.steps,
            global_batch_size=self.global_batch_size,
            log_every=self.log_every,
            save_every=self.save_every,
        )
        require_at_least(
            1,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            max_skipped_steps=self.max_skipped_steps,
            keep_last=self.keep_last,
        )
        require_at_least(1, num_previews=self.num_previews, fp8_log_every=self.fp8_log_every)
        require_at_least(
            0,
            warmup_steps=self.warmup_steps,
            lr=self.lr,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
        )
        if self.max_grad_norm == 0:
            raise ValueError("max_grad_norm=0: every gradient would become 0; what is never reached clips nothing")
        require_at_least(0, eps=self.eps, seed=self.seed)
        require_at_least(
            0, validate_every=self.validate_every, preview_every=self.preview_every, profile_step=self.profile_step
        )
        require_at_least(0, num_validation_samples=self.num_validation_samples, keep_every=self.keep_every)
        require_at_least(0.01, hang_timeout_minutes=self.hang_timeout_minutes)
        require_share(
            min_lr_ratio=self.min_lr_ratio,
            ema_decay=self.ema_decay,
            cond_dropout_prob=self.cond_dropout_prob,
            short_caption_prob=self.short_caption_prob,
        )
        require_share(beta1=self.beta1, beta2=self.beta2)
        if 1 in (self.beta1, self.beta2):
            raise ValueError(f"beta1={self.beta1}, beta2={self.beta2}: must be less than 1")
        if self.validate_every and not self.num_validation_samples:
            raise ValueError(f"validate_every={self.validate_every}: needs num_validation_samples, which are 0")


def fp8_backend(wanted: str, recipe: str) -> str:
    """What trains in FP8 by a plan of this recipe. Raises ValueError where `wanted` does not."""
    able = FP8_BACKENDS[recipe]
    if wanted not in ("auto", *able):
        allowed = ", ".join(f"{' or '.join(backends)} for {name}" for name, backends in FP8_BACKENDS.items())
        raise ValueError(
            f"fp8_backend={wanted}: does not follow the plan's recipe {recipe!r} ({allowed}); convert with another "
            "--recipe to train here"
        )
    return able[0] if wanted == "auto" else wanted
