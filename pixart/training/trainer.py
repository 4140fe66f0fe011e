"""The training state of either stage, and one optimizer step on it."""

import dataclasses
import hashlib
import logging
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pixart.checkpoint.directory import Checkpoint
from pixart.checkpoint.normalization import Normalization
from pixart.config.latent_space import check_latent_space
from pixart.config.model import ModelConfig
from pixart.config.resolutions import time_shift
from pixart.config.training import TrainConfig, resolve_fp8_backend
from pixart.data.loading.loader import Batch
from pixart.data.manifest import Manifest
from pixart.data.store.zarr_store import Store
from pixart.model import sdpa_autotune
from pixart.model.dit import DiT, public_config
from pixart.model.fp8 import fsdp_allgather, linear, scaling, torchao, transformer_engine
from pixart.model.fp8.plan import Plan, check_gemm_alignment
from pixart.model.rectified_flow import flow_loss, interpolate, sample_time, shift_time
from pixart.model.sdpa import AttentionKernel
from pixart.training.conditioning import TEXT_ALIGNMENT, ClassConditioning, TextConditioning
from pixart.training.ema import EMA, ema_decay
from pixart.training.fused_adamw_ema import FusedAdamWEma
from pixart.training.optimizer import clip_gradients, learning_rate, make_optimizer, optimizer_tensors
from pixart.training.parallelize import compute_dtype, parallelize
from pixart.training.process_group import Ranks

logger = logging.getLogger(__name__)


class Trainer:
    """Model, optimizer, EMA weights and FP8 scales of a run, sharded over the ranks.

    `start` has the metadata of the checkpoint to continue from; `checkpointing.restore` reads its tensors.
    """

    def __init__(
        self, start: Checkpoint | None, stage: int, model: ModelConfig, config: TrainConfig, store: Store, ranks: Ranks
    ) -> None:
        self.stage, self.config, self.ranks, self.dataset = stage, config, ranks, store.manifest
        self.steps_done = start.step if start else 0
        self.provenance = start.provenance if start else {}
        self.normalization = start.normalization if start else dataset_normalization(store)
        self.plan = start.plan if start and config.fp8 else None
        if config.fp8 and self.plan is None:
            raise ValueError(
                "fp8=true: needs a checkpoint with an FP8 plan; run `python -m conversion.to_fp8` and pass its result "
                "with --from"
            )
        torch.manual_seed(config.seed)
        if start:
            with torch.device("meta"):
                self.model = DiT(**start.config)
        else:
            self.model = new_model(stage, model, self.dataset).to(ranks.device)
        check_model_fits_dataset(self.model, self.dataset, stage)
        if start:
            check_latent_space(
                "the checkpoint",
                start.normalization.pixel_range,
                start.provenance.get("models", {}),
                self.dataset.data.path,
                self.dataset.data.pixel_range,
                self.dataset.models,
            )
        self.latent_sizes = latent_sizes(store)
        self.model.train()
        self.model.fuse_projections()
        if config.attention_backend == "autotune" and ranks.device.type == "cuda":
            kernels = self.autotune_attention() if ranks.is_first else None
            sdpa_autotune.set_kernels_by_tokens(self.model, ranks.broadcast_object(kernels))
        if self.plan:
            self.swap_linears(self.plan)
        parallelize(self.model, ranks, config)
        if start:
            self.model.to_empty(device=ranks.device)
        fsdp_allgather.enable_fp8_all_gather(self.model, compute_dtype(config.precision), compile=config.compile)
        self.optimizer = make_optimizer(self.model, config)
        self.ema = EMA(self.model, config.ema_decay)
        self.fused_update = (
            FusedAdamWEma(self.model, self.optimizer, self.ema.weights) if config.fused_adamw_ema else None
        )
        self.consecutive_skips = torch.zeros((), device=ranks.device)
        self.conditioning = (
            ClassConditioning(self.model, ranks.device) if stage == 1 else TextConditioning(self.dataset, ranks, config)
        )

    def autotune_attention(self) -> dict[int, tuple[AttentionKernel, AttentionKernel]]:
        """Return the fastest kernels of self-attention and cross-attention by the number of an image's tokens."""
        model = self.model.config
        kernels = {}
        for tokens in sorted(set(map(self.tokens_per_image, self.latent_sizes))):
            self_attention, cross_attention = kernels[tokens] = sdpa_autotune.autotune(
                batch=self.micro_batch_size,
                heads=model.num_heads,
                head_dim=model.dim // model.num_heads,
                tokens=tokens,
                text_tokens=self.dataset.data.max_text_tokens if self.stage == 2 else None,
                device=self.ranks.device,
            )
            cross = f"; cross-attention: {cross_attention}" if self.stage == 2 else ""
            logger.info("fastest self-attention of %d tokens: %s%s", tokens, self_attention, cross)
        return kernels

    def swap_linears(self, plan: Plan) -> None:
        """Replace the planned linears using the backend for the plan's recipe."""
        backend = resolve_fp8_backend(self.config.fp8_backend, plan.recipe)
        if self.config.finish_bf16_steps and backend != "native":
            raise ValueError(
                f"finish_bf16_steps={self.config.finish_bf16_steps}: the FP8 linears of {backend} cannot change to "
                "BF16 within a run; use a plan with the recipe delayed, or set it to 0"
            )
        if backend == "native":
            if self.ranks.device.type == "cuda" and self.config.fp8_grad_weight:
                check_gemm_alignment(self.micro_batch_size, self.rows_per_image())
            high_precision = not self.config.fp8_grad_weight
            linear.swap_linears(self.model, plan, high_precision_grad_weight=high_precision)
        elif backend == "torchao":
            torchao.swap_linears(self.model, plan)
        else:
            transformer_engine.swap_linears(self.model, plan)

    def rows_per_image(self) -> dict[str, int]:
        """Return the numbers of rows of an image in the inputs of linears, by kind of row."""
        rows = {
            f"image tokens of {height}x{width} latents": self.tokens_per_image((height, width))
            for height, width in self.latent_sizes
        }
        text = {"text tokens": math.gcd(TEXT_ALIGNMENT, self.dataset.data.max_text_tokens)} if self.stage == 2 else {}
        return rows | text

    def train_step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Take one optimizer step on this rank's part of the global batch -> its loss () and the gradient norm ().

        Gradients that are not finite leave weights and moments unchanged. Nothing here synchronizes with the device.
        """
        self.finish_in_bf16()
        data = self.normalization.apply(batch.latents.to(self.ranks.device, non_blocking=True))
        noise, t = self.sample_noise_and_time(data.shape[1:])
        loss = torch.zeros((), device=self.ranks.device)
        for rows in self.micro_batches(len(data)):
            self.model.set_requires_gradient_sync(rows.stop == len(data))
            noised = interpolate(data[rows], noise[rows], t[rows])
            velocity = self.model(noised, t[rows], **self.conditioning(batch.slice_rows(rows)))
            micro_loss = flow_loss(velocity, data[rows], noise[rows]) / self.config.gradient_accumulation_steps
            micro_loss.backward()
            loss += micro_loss.detach()
        grad_norm = clip_gradients(self.model, self.config.max_grad_norm)
        skip = ~grad_norm.isfinite()
        self.update_weights(skip)
        self.optimizer.zero_grad()
        self.consecutive_skips = (self.consecutive_skips + 1) * skip
        if self.plan:
            scaling.update_scales(self.model, self.plan)
        self.steps_done += 1
        return loss, grad_norm

    def update_weights(self, skip: Tensor) -> None:
        """Update weights and moments, unless `skip` () is true, and then the EMA weights."""
        lr = learning_rate(self.steps_done, self.config)
        if self.fused_update:
            self.fused_update.step(lr, 1 - ema_decay(self.steps_done, self.config.ema_decay), skip)
            return
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # Fused AdamW skips the update where `found_inf` is nonzero.
        self.optimizer.found_inf = skip.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.ema.update(self.model, self.steps_done)

    def sample_noise_and_time(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Return this rank's noise (B, C, h, w) and t (B,); those of the global batch do not depend on the ranks."""
        generator = step_generator(self.config.seed, self.steps_done, self.ranks.device)
        noise = torch.randn((self.config.global_batch_size, *shape), generator=generator, device=self.ranks.device)
        t = shift_time(sample_time(self.config.global_batch_size, generator), self.time_shift(*shape[1:]))
        local_batch_size = self.config.global_batch_size // self.ranks.world_size
        rows = slice(self.ranks.rank * local_batch_size, (self.ranks.rank + 1) * local_batch_size)
        return noise[rows], t[rows]

    def time_shift(self, height: int, width: int) -> float:
        """Return the time shift of latents of height x width."""
        return time_shift(self.config.time_shift, height, width, self.model.config.base_image_size)

    def tokens_per_image(self, latent_size: tuple[int, int]) -> int:
        """Return the number of patches of latents of a height and width."""
        height, width = latent_size
        patch = self.model.config.patch_size
        return (height // patch) * (width // patch)

    @property
    def micro_batch_size(self) -> int:
        """Images per forward pass of a rank."""
        return self.config.global_batch_size // self.ranks.world_size // self.config.gradient_accumulation_steps

    def micro_batches(self, rows: int) -> Iterator[slice]:
        """Return the rows of each micro-batch of this rank's part of the batch."""
        return (slice(begin, begin + self.micro_batch_size) for begin in range(0, rows, self.micro_batch_size))

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint by key: sharded, on the device, not copies."""
        groups = {
            "model": {**dict(self.model.named_parameters()), **persistent_buffers(self.model)},
            "ema": {**self.ema.weights, **persistent_buffers(self.model)},
            "optimizer": optimizer_tensors(self.optimizer, self.model),
            "scales": scaling.scale_tensors(self.model),
        }
        return {f"{group}.{name}": tensor.detach() for group, items in groups.items() for name, tensor in items.items()}

    def metadata(self) -> Checkpoint:
        """Return the checkpoint of the current state without its tensors."""
        # Fingerprints of the encoders whose output the model has learned to read.
        encoders = ("vae", "text_encoder")[: self.stage]
        fingerprints = {encoder: self.dataset.models[encoder] for encoder in encoders}
        return Checkpoint(
            stage=self.stage,
            step=self.steps_done,
            config=public_config(self.model.config),
            normalization=self.normalization,
            plan=self.plan,
            dataset=self.dataset.data.path,
            provenance={
                **self.provenance,
                "dataset_hash": self.dataset.hash,
                "models": fingerprints,
                "cond_dropout_prob": self.config.cond_dropout_prob,
                "decay_qk_norm": self.config.decay_qk_norm,
                "time_shift": self.config.time_shift,
                "image_shapes": [list(shape) for shape in self.dataset.image_shapes],
                "downsampling_factor": self.dataset.downsampling_factor,
            },
        )

    def rescale_gradients_for_batch_size(self) -> None:
        """Rescale the FP8 scales of gradients if the batch size per rank has changed since they were measured."""
        if self.plan:
            local_batch_size = self.config.global_batch_size // self.ranks.world_size
            scaling.rescale_gradients(self.model, self.plan.batch / local_batch_size)
            self.plan = dataclasses.replace(self.plan, batch=local_batch_size)

    def fall_back_to_bf16(self) -> list[str]:
        """Disable FP8 in linears that saturate in too many steps, and return a message for each."""
        if not self.plan:
            return []
        names = self.replace_plan(scaling.fall_back_to_bf16(self.model, self.plan, self.steps_done))
        return [f"{name} falls back to BF16: it {self.plan.kept[name]}" for name in names]

    def finish_in_bf16(self) -> None:
        """Disable FP8 in all linears from the first of the last `config.finish_bf16_steps` steps on."""
        count = self.config.finish_bf16_steps
        if count and self.plan and self.plan.linears and self.steps_done >= self.config.steps - count:
            reason = f"stage{self.stage}.finish_bf16_steps={count}"
            self.replace_plan(scaling.disable_fp8(self.model, self.plan, dict.fromkeys(self.plan.linears, reason)))

    def replace_plan(self, plan: Plan) -> list[str]:
        """Take a plan with fewer linears, gather the weights of the others in BF16, and return their names."""
        assert self.plan
        names = sorted(set(self.plan.linears) - set(plan.linears))
        self.plan = plan
        for name in names:
            fsdp_allgather.disable_fp8_all_gather(self.model, name)
        return names


def persistent_buffers(model: DiT) -> dict[str, Tensor]:
    """Return the buffers that are part of the state dictionary, which FP8 scales are not."""
    state = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name in state}


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Return the random generator of one step, which a resumed run reproduces without saved state."""
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7]))


def dataset_normalization(store: Store) -> Normalization:
    """Return the normalization with the dataset's per-channel statistics."""
    mean, std = store.statistics()
    return Normalization(mean=mean, std=std, pixel_range=store.manifest.data.pixel_range)


def latent_sizes(store: Store) -> list[tuple[int, int]]:
    """Return the (height, width) of the latents of each aspect bucket that has valid rows, or the only one."""
    buckets = np.unique(store.bucket_of(store.valid_rows())).tolist()
    return [store.manifest.latent_shapes[bucket][1:] for bucket in buckets]


def new_model(stage: int, model: ModelConfig, dataset: Manifest) -> DiT:
    """Return an initialized model for a stage, with the text dimension of the dataset in stage 2."""
    sizes = model.dit_arguments()
    classes = sizes.pop("num_classes")
    return DiT(**sizes, **({"num_classes": classes} if stage == 1 else {"text_dim": dataset.text_dim}))


def check_model_fits_dataset(model: DiT, dataset: Manifest, stage: int) -> None:
    """Raise ValueError unless the model has the right stage and reads the dataset's latents, classes and text."""
    config = model.config
    if model.stage != stage:
        raise ValueError(
            f"stage={stage}: the checkpoint is of stage {model.stage}; convert it, or train stage {model.stage}"
        )
    if config.in_dim != dataset.latent_shape[0]:
        raise ValueError(f"model.in_dim={config.in_dim}: the dataset's latents have {dataset.latent_shape[0]} channels")
    for _, height, width in dataset.latent_shapes:
        if height % config.patch_size or width % config.patch_size:
            raise ValueError(
                f"model.patch_size={config.patch_size}: does not divide the dataset's latents of {height} x {width}"
            )
    if stage == 1 and len(dataset.class_names) >= config.num_classes:
        raise ValueError(
            f"model.num_classes={config.num_classes}: must be greater than the dataset's {len(dataset.class_names)} "
            "classes, as the last index is the null class"
        )
    if stage == 2 and config.text_dim != dataset.text_dim:
        raise ValueError(f"model.text_dim={config.text_dim}: the dataset's text embeddings have {dataset.text_dim}")
