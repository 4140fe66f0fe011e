"""Configuration of one stage of training."""

from dataclasses import dataclass
from typing import Literal

from pixart.config.limits import require_at_least, require_fraction, require_positive
from pixart.config.resolutions import AUTO, check_time_shift

# Backends that can train by a plan of each FP8 recipe, the default first; TransformerEngine (te) needs a GPU.
FP8_BACKENDS = {"delayed": ("native",), "current": ("torchao", "te"), "rowwise": ("torchao",), "mxfp8": ("te",)}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One stage of training. Raises ValueError naming the field for a value out of range."""

    steps: int
    """Number of optimizer steps."""

    global_batch_size: int
    """Number of images of one optimizer step, over all ranks and micro-batches."""

    lr: float
    """Peak learning rate of AdamW."""

    warmup_steps: int
    """Number of steps over which the learning rate grows linearly from 0."""

    min_lr_ratio: float = 1.0
    """Fraction of the peak learning rate that cosine decay ends at; 1 keeps the rate constant after the warm-up."""

    weight_decay: float = 0.01
    """Weight decay of AdamW, applied neither to biases nor to normalizations and embeddings."""

    decay_qk_norm: bool = False
    """Whether weight decay also applies to the weights of the norms of queries and keys, as in the original training
    with TransformerEngine."""

    beta1: float = 0.9
    """Decay of AdamW's first moment."""

    beta2: float = 0.95
    """Decay of AdamW's second moment."""

    eps: float = 1e-15
    """Term that AdamW adds to the denominator."""

    max_grad_norm: float | None = 1.0
    """Global gradient norm above which gradients are clipped to it; none does not clip."""

    ema_decay: float = 0.9999
    """Decay of the EMA weights; it warms up as (1 + step) / (10 + step)."""

    cond_dropout_prob: float = 0.1
    """Probability of training an image on the null condition, for classifier-free guidance."""

    short_caption_prob: float = 0.0
    """Probability of training an image on its short caption; stage 2 only, and needs data.short_captions."""

    time_shift: str = AUTO
    """Shift of the timesteps towards noise, as in Stable Diffusion 3: a positive number, 1 for none, or auto, the side
    of a square with the latents' area divided by model.base_latent_size."""

    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of computation outside of FP8 linears; master weights are float32."""

    fp8: bool = False
    """Whether to train in FP8; needs a checkpoint by conversion.to_fp8."""

    fp8_recipe: Literal["delayed", "current", "rowwise", "mxfp8"] = "delayed"
    """FP8 scaling recipe that a pipeline converts with, and that the command after stage 1 names; training itself
    follows the plan of the checkpoint."""

    fp8_backend: Literal["auto", "native", "torchao", "te"] = "auto"
    """Implementation of FP8 linears; `auto` takes the default one for the recipe of the checkpoint's plan."""

    fp8_grad_weight: bool = True
    """Whether the native backend computes weight gradients in FP8 rather than in BF16."""

    finish_bf16_steps: int = 0
    """Number of steps at the end of an FP8 training that all linears compute in BF16; native backend only."""

    seed: int = 0
    """Random seed of initialization, data order, noise and timesteps."""

    max_skipped_steps: int = 10
    """Number of consecutive steps with non-finite gradients, which are skipped, after which training ends."""

    gradient_accumulation_steps: int = 1
    """Number of micro-batches that each rank splits its part of the global batch into."""

    sharding: Literal["fsdp", "hsdp"] = "fsdp"
    """Sharding of the weights: `fsdp` over all ranks, `hsdp` over the ranks of a node with a replica on each node."""

    reshard_after_forward: bool = True
    """Whether to free a block's gathered weights after its forward pass, which saves memory for one more all-gather."""

    compile: bool = False
    """Whether to compile each transformer block, and the text encoder, with torch.compile."""

    fused_adamw_ema: bool = False
    """Whether to update weights and EMA weights in one compiled pass over memory."""

    attention_backend: Literal["autotune", "default"] = "autotune"
    """Attention kernel on a GPU: `autotune` times the available kernels and takes the fastest, `default` leaves the
    choice to PyTorch."""

    shard_text_encoder: bool = False
    """Whether to shard the text encoder over all ranks rather than to replicate it; it is used in stage 2 on datasets
    without data.store_text_embeddings."""

    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """Activations of a block that are recomputed in the backward pass: `none`, `selective` all but the results of
    matrix multiplications and attention, or `full`."""

    log_every: int = 10
    """Number of steps between two logs of metrics."""

    fp8_log_every: int = 100
    """Number of steps between two logs of the FP8 scales."""

    save_every: int = 1000
    """Number of steps between two checkpoints; the last step is always saved."""

    keep_last: int = 3
    """Number of newest checkpoints to keep."""

    keep_every: int = 0
    """Checkpoints of steps that are multiples of this number are kept for good; 0 keeps the newest ones only."""

    validate_every: int = 0
    """Number of steps between two validations; 0 never validates."""

    num_validation_samples: int = 0
    """Number of images reserved for validation, the same in both stages; at most a tenth of the dataset is taken."""

    preview_every: int = 0
    """Number of steps between two sets of preview images; 0 makes none."""

    num_previews: int = 8
    """Number of images of a preview."""

    evaluate_every: int = 0
    """Number of steps between two evaluations of a checkpoint, which run beside training by the section evaluation; a
    multiple of save_every, and evaluated checkpoints are kept for good; 0 never evaluates."""

    hang_timeout_minutes: float = 10.0
    """Minutes without a completed step after which every rank prints its stack traces."""

    profile_step: int = 0
    """First of the three steps that a profiler trace is written of; 0 writes none."""

    def __post_init__(self) -> None:
        require_at_least(
            1,
            steps=self.steps,
            global_batch_size=self.global_batch_size,
            max_skipped_steps=self.max_skipped_steps,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            log_every=self.log_every,
            fp8_log_every=self.fp8_log_every,
            save_every=self.save_every,
            keep_last=self.keep_last,
            num_previews=self.num_previews,
        )
        require_at_least(
            0,
            lr=self.lr,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            eps=self.eps,
            seed=self.seed,
            finish_bf16_steps=self.finish_bf16_steps,
            keep_every=self.keep_every,
            validate_every=self.validate_every,
            num_validation_samples=self.num_validation_samples,
            preview_every=self.preview_every,
            evaluate_every=self.evaluate_every,
            profile_step=self.profile_step,
        )
        check_time_shift(self.time_shift)
        if self.max_grad_norm is not None:
            require_positive(max_grad_norm=self.max_grad_norm)
        require_at_least(0.01, hang_timeout_minutes=self.hang_timeout_minutes)
        require_fraction(
            min_lr_ratio=self.min_lr_ratio,
            beta1=self.beta1,
            beta2=self.beta2,
            ema_decay=self.ema_decay,
            cond_dropout_prob=self.cond_dropout_prob,
            short_caption_prob=self.short_caption_prob,
        )
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if beta == 1:
                raise ValueError(f"{name}={beta}: must be less than 1")
        if self.evaluate_every % self.save_every:
            raise ValueError(
                f"evaluate_every={self.evaluate_every}: must be a multiple of save_every={self.save_every}, or 0"
            )
        if self.validate_every and not self.num_validation_samples:
            raise ValueError(
                f"validate_every={self.validate_every}: num_validation_samples is 0; it must be at least 1, or "
                "validate_every 0"
            )


def resolve_fp8_backend(backend: str, fp8_recipe: str) -> str:
    """Return the backend to train with by a plan of an FP8 recipe; `auto` stands for the recipe's default.

    Raises ValueError for a backend that cannot train by such a plan.
    """
    supported = FP8_BACKENDS[fp8_recipe]
    if backend not in ("auto", *supported):
        allowed = ", ".join(f"{' or '.join(backends)} for {name}" for name, backends in FP8_BACKENDS.items())
        raise ValueError(
            f"fp8_backend={backend}: does not support the plan's FP8 recipe {fp8_recipe!r}; it must be auto or one "
            f"that does ({allowed}), or convert again with another FP8 recipe"
        )
    return supported[0] if backend == "auto" else backend
