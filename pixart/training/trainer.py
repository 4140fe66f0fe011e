"""One optimizer step of either stage, and all the state that it changes."""

import dataclasses
import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pixart.checkpoint.directory import Checkpoint
from pixart.checkpoint.normalization import Normalization
from pixart.config.model import ModelConfig
from pixart.config.training import TrainConfig, resolve_fp8_backend
from pixart.data.loading.loader import Batch
from pixart.data.manifest import Manifest
from pixart.data.store.zarr_store import Store
from pixart.model import sdpa_autotune
from pixart.model.dit import DiT, own_config
from pixart.model.fp8 import fsdp_allgather, linear, scaling, torchao, transformer_engine
from pixart.model.fp8.plan import Plan, check_rows
from pixart.model.rectified_flow import flow_loss, interpolate, sample_time
from pixart.model.sdpa import Kernel
from pixart.training.conditioning import ALIGNMENT, ClassCondition, TextCondition
from pixart.training.ema import Ema, decay_at
from pixart.training.fused_adamw_ema import OnePass
from pixart.training.optimizer import learning_rate, make_optimizer, optimizer_tensors
from pixart.training.parallelize import dtype_of, parallelize
from pixart.training.process_group import Ranks


class Training:
    """Model, optimizer, average and scales of a run, sharded over the ranks.

    `tensors` are those that a checkpoint keeps. What `start` has in them is not read here: see `saving.restore`.
    """

    def __init__(
        self, start: Checkpoint | None, stage: int, model: ModelConfig, config: TrainConfig, store: Store, ranks: Ranks
    ) -> None:
        self.stage, self.config, self.ranks, self.dataset = stage, config, ranks, store.manifest
        self.steps_done = start.step if start else 0
        self.provenance = start.provenance if start else {}
        self.normalization = start.normalization if start else Normalization(**statistics(store))
        self.plan = start.plan if start and config.fp8 else None
        if config.fp8 and self.plan is None:
            raise ValueError(
                "FP8 training goes on from a checkpoint that `python -m conversion.to_fp8` wrote: name it by --from"
            )
        torch.manual_seed(config.seed)
        if start:
            with torch.device("meta"):
                self.model = DiT(**start.config)
        else:
            self.model = fresh_model(stage, model, self.dataset).to(ranks.device)
        check_fits(self.model, self.dataset, stage)
        self.model.train()
        self.model.fuse_projections()
        if config.attention_backend == "autotune" and ranks.device.type == "cuda":
            sdpa_autotune.use(self.model, *ranks.of_first(self.fastest_attention() if ranks.first else None))
        if self.plan:
            self.swap_linears(self.plan)
        parallelize(self.model, ranks, config)
        if start:
            self.model.to_empty(device=ranks.device)
        fsdp_allgather.gather_in_fp8(self.model, dtype_of(config.precision))
        self.optimizer = make_optimizer(self.model, config)
        self.ema = Ema(self.model, config.ema_decay)
        self.one_pass = OnePass(self.model, self.optimizer, self.ema.averages) if config.fused_adamw_ema else None
        self.skipped_in_row = torch.zeros((), device=ranks.device)
        self.condition = (
            ClassCondition(self.model, ranks.device) if stage == 1 else TextCondition(self.dataset, ranks, config)
        )

    def fastest_attention(self) -> tuple[Kernel, Kernel]:
        """To the image and to the text, at the sizes of this run."""
        model = self.model.config
        image, text = sdpa_autotune.measured(
            batch=self.micro_batch,
            heads=model.num_heads,
            width=model.dim // model.num_heads,
            tokens=self.tokens,
            text=self.dataset.data.max_text_tokens if self.stage == 2 else None,
            device=self.ranks.device,
        )
        print(f"attention: {image}" + (f"; to the text, {text}" if self.stage == 2 else ""), flush=True)
        return image, text

    def swap_linears(self, plan: Plan) -> None:
        """By the backend that follows the plan."""
        backend = resolve_fp8_backend(self.config.fp8_backend, plan.recipe)
        if backend == "native":
            if self.ranks.device.type == "cuda" and self.config.fp8_grad_weight:
                text = {"states of text": math.gcd(ALIGNMENT, self.dataset.data.max_text_tokens)}
                check_rows(self.micro_batch, {"image tokens": self.tokens} | (text if self.stage == 2 else {}))
            linear.swap_linears(self.model, plan, fine_weight_gradient=not self.config.fp8_grad_weight)
        elif backend == "torchao":
            torchao.swap_linears(self.model, plan)
        else:
            transformer_engine.swap_linears(self.model, plan)

    def step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One optimizer step on this rank's part of the global batch -> its loss () and the gradient's norm ().

        A gradient that is not finite leaves weights and moments as they are. Nothing here waits for the device.
        """
        data = self.normalization.apply(batch.latents.to(self.ranks.device, non_blocking=True))
        noise, t = self.draw(data.shape[1:])
        loss = torch.zeros((), device=self.ranks.device)
        for rows in self.micro_batches(len(data)):
            self.model.set_requires_gradient_sync(rows.stop == len(data))
            noised = interpolate(data[rows], noise[rows], t[rows])
            velocity = self.model(noised, t[rows], **self.condition(batch.part(rows)))
            part = flow_loss(velocity, data[rows], noise[rows]) / self.config.gradient_accumulation_steps
            part.backward()
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm).full_tensor()
        not_finite = ~norm.isfinite()
        self.update(not_finite)
        self.optimizer.zero_grad()
        self.skipped_in_row = (self.skipped_in_row + 1) * not_finite
        if self.plan:
            scaling.update_scales(self.model, self.plan)
        self.steps_done += 1
        return loss, norm

    def update(self, skip: Tensor) -> None:
        """Weights and moments, unless `skip` () says that they stay, and the average after them."""
        rate = learning_rate(self.steps_done, self.config)
        if self.one_pass:
            self.one_pass.step(rate, 1 - decay_at(self.steps_done, self.config.ema_decay), skip)
            return
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.found_inf = skip.float()  # its fused kernel looks at it
        self.optimizer.step()
        self.ema.update(self.model, self.steps_done)

    def draw(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """This rank's part of the noise (B, C, h, w) and t (B,) of a global batch, whatever the number of ranks."""
        generator = step_generator(self.config.seed, self.steps_done, self.ranks.device)
        noise = torch.randn((self.config.global_batch_size, *shape), generator=generator, device=self.ranks.device)
        t = sample_time(self.config.global_batch_size, generator)
        part = self.config.global_batch_size // self.ranks.world
        own = slice(self.ranks.rank * part, (self.ranks.rank + 1) * part)
        return noise[own], t[own]

    @property
    def tokens(self) -> int:
        """Of an image."""
        _, height, width = self.dataset.latent_shape
        patch = self.model.config.patch_size
        return (height // patch) * (width // patch)

    @property
    def micro_batch(self) -> int:
        """Images that go through the model of a rank at once."""
        return self.config.global_batch_size // self.ranks.world // self.config.gradient_accumulation_steps

    def micro_batches(self, rows: int) -> Iterator[slice]:
        return (slice(begin, begin + self.micro_batch) for begin in range(0, rows, self.micro_batch))

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint keeps, by name, as it is: sharded, on its device, and changed by the next step."""
        named = {
            "model": {**dict(self.model.named_parameters()), **persistent_buffers(self.model)},
            "ema": {**self.ema.averages, **persistent_buffers(self.model)},
            "optimizer": optimizer_tensors(self.optimizer, self.model),
            "scales": scaling.scale_tensors(self.model),
        }
        return {f"{group}.{name}": tensor.detach() for group, found in named.items() for name, tensor in found.items()}

    def description(self) -> Checkpoint:
        """Of the state, without the tensors."""
        return Checkpoint(
            stage=self.stage,
            step=self.steps_done,
            config=own_config(self.model.config),
            normalization=self.normalization,
            plan=self.plan,
            dataset=self.dataset.data.path,
            provenance={**self.provenance, "dataset_hash": self.dataset.hash, "models": self.models_read},
        )

    @property
    def models_read(self) -> dict[str, str]:
        """Fingerprints of the models whose output this one has learnt to read."""
        return {kind: self.dataset.models[kind] for kind in ("vae", "text_encoder")[: self.stage]}

    def fit_gradient_scales(self) -> None:
        """Follows a change of the batch of a rank since the scales were measured."""
        if self.plan:
            local_batch = self.config.global_batch_size // self.ranks.world
            scaling.rescale_gradients(self.model, self.plan.batch / local_batch)
            self.plan = dataclasses.replace(self.plan, batch=local_batch)

    def fall_back(self) -> list[str]:
        """Takes linears that keep overflowing out of FP8, and says which."""
        if not self.plan:
            return []
        before, self.plan = self.plan, scaling.fall_back(self.model, self.plan, self.steps_done)
        fallen = sorted(set(before.linears) - set(self.plan.linears))
        for name in fallen:
            fsdp_allgather.gather_as_given(self.model, name)
        return [f"{name} goes on in BF16: it {self.plan.kept[name]}" for name in fallen]


def persistent_buffers(model: DiT) -> dict[str, Tensor]:
    """Those of the state dictionary; scales are kept by themselves."""
    kept = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Random numbers of one step: nothing to save, and a resumed run draws the same."""
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7]))


def statistics(store: Store) -> dict[str, tuple[float, ...]]:
    mean, std = store.statistics()
    return {"mean": mean, "std": std}


def fresh_model(stage: int, model: ModelConfig, dataset: Manifest) -> DiT:
    sizes = model.dit_arguments()
    classes = sizes.pop("num_classes")
    return DiT(**sizes, **({"num_classes": classes} if stage == 1 else {"text_dim": dataset.text_dim}))


def check_fits(model: DiT, dataset: Manifest, stage: int) -> None:
    """Raises ValueError unless the model can read what the dataset holds."""
    config = model.config
    if model.stage != stage:
        raise ValueError(
            f"the checkpoint is of stage {model.stage}, not {stage}: convert it first, or train stage {model.stage}"
        )
    if config.in_dim != dataset.latent_shape[0]:
        raise ValueError(f"the model reads {config.in_dim} latent channels, the dataset has {dataset.latent_shape[0]}")
    if stage == 1 and len(dataset.class_names) >= config.num_classes:
        raise ValueError(
            f"the dataset has {len(dataset.class_names)} classes: model.num_classes={config.num_classes} "
            "must be larger by one at least, the last index means no class"
        )
    if stage == 2 and config.text_dim != dataset.text_dim:
        raise ValueError(
            f"the model reads text states of width {config.text_dim}, the dataset's are {dataset.text_dim} wide"
        )
