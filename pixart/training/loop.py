"""Training of either stage: rectified flow, FSDP2, AdamW, EMA, FP8 by plan, checkpoints, resume."""

import dataclasses
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pixart import checkpoint as checkpoints
from pixart.checkpoint import Checkpoint, Normalization
from pixart.config import ModelConfig, TrainConfig
from pixart.data import manifest as manifests
from pixart.data.loader import Batch, Loader
from pixart.data.store import Store
from pixart.model import fp8
from pixart.model.dit import DiT, own_config
from pixart.model.flow import flow_loss, interpolate, sample_time
from pixart.training.distributed import Ranks, process_group, shard, whole
from pixart.training.ema import Ema
from pixart.training.optimizer import learning_rate, load_optimizer_state, make_optimizer, optimizer_state

Report = Callable[[int, dict[str, float]], None]


class Stopped(Exception):  # noqa: N818 - no error
    """Training has ended early, saved at a step boundary; `level` is the largest that any rank was asked with."""

    def __init__(self, level: int) -> None:
        super().__init__(f"stopped by request of level {level}")
        self.level = level


class Training:
    """Model, optimizer, average and scales of a run that `step` and `save` act on."""

    def __init__(
        self, start: Checkpoint | None, stage: int, model: ModelConfig, config: TrainConfig, store: Store, ranks: Ranks
    ) -> None:
        self.stage, self.config, self.store, self.ranks = stage, config, store, ranks
        self.dataset = manifests.read(store.manifest.data.path)
        self.steps_done = start.step if start else 0
        self.provenance = start.provenance if start else {}
        self.normalization = start.normalization if start else Normalization(**statistics(store))
        torch.manual_seed(config.seed)
        self.model = DiT(**start.config) if start else fresh_model(stage, model, self.dataset)
        check_fits(self.model, self.dataset, stage)
        self.plan = start.plan if start and config.fp8 else None
        if config.fp8 and self.plan is None:
            raise ValueError(
                "FP8 training goes on from a checkpoint that `python -m conversion.to_fp8` wrote: name it by --from"
            )
        if start:
            self.model.load_state_dict(start.model, strict=True)
        self.model.train().to(ranks.device)
        if start and self.plan:
            fp8.check_recipe(self.plan)
            fp8.swap_linears(self.model, self.plan)
            fp8.load_scale_state(self.model, start.scales)
            local_batch = config.batch // ranks.world
            fp8.rescale_gradients(self.model, self.plan.batch / local_batch)
            self.plan = dataclasses.replace(self.plan, batch=local_batch)
        shard(self.model, ranks, config.precision)
        self.optimizer = make_optimizer(self.model, config)
        self.ema = Ema(self.model, config.ema)
        if start:
            load_optimizer_state(self.optimizer, self.model, start.optimizer)
            self.ema.load(start.ema)
        self.condition = (
            ClassCondition(self.model, ranks.device) if stage == 1 else TextCondition(self.dataset, ranks.device)
        )

    def step(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """One optimizer step -> loss of this rank () and norm of the gradient before clipping ()."""
        generator = step_generator(self.config.seed, self.steps_done, self.ranks.rank)
        device = self.ranks.device
        data = self.normalization.apply(batch.latents.to(device, non_blocking=True))
        noise = torch.randn(data.shape, generator=generator).to(device)
        t = sample_time(len(data), generator).to(device)

        velocity = self.model(interpolate(data, noise, t), t, **self.condition(batch))
        loss = flow_loss(velocity, data, noise)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)

        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.steps_done, self.config)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.model, self.steps_done)
        if self.plan:
            fp8.update_scales(self.model, self.plan)
        self.steps_done += 1
        return loss.detach(), norm

    def checkpoint(self) -> Checkpoint:
        """The whole state on the CPU; every rank must call it."""
        buffers = {
            name: buffer.cpu() for name, buffer in self.model.state_dict().items() if not hasattr(buffer, "full_tensor")
        }
        parameters = {name: whole(parameter) for name, parameter in self.model.named_parameters()}
        return Checkpoint(
            stage=self.stage,
            step=self.steps_done,
            config=own_config(self.model.config),
            model={**buffers, **parameters},
            ema={**buffers, **self.ema.state()},
            optimizer=optimizer_state(self.optimizer, self.model),
            normalization=self.normalization,
            plan=self.plan,
            scales=fp8.scale_state(self.model),
            dataset=self.dataset.data.path,
            provenance={**self.provenance, "dataset_hash": self.dataset.hash},
        )


def train(
    *,
    stage: int,
    model: ModelConfig,
    config: TrainConfig,
    dataset: str,
    run: str | Path,
    start: str | Path | None = None,
    report: Report = lambda step, metrics: None,
    stop: Callable[[], int] = lambda: 0,
) -> Path:
    """Trains to `config.steps` and returns the last checkpoint's directory.

    A run folder that has checkpoints is resumed from the newest; else training goes on from `start`, or begins
    afresh. Every rank calls this; rank 0 reports and saves. Where `stop` is not 0 on any rank, all save after the
    same step and raise Stopped. Raises ValueError for what the user can mend.
    """
    run = Path(run)
    if stage == 1 and config.short > 0:
        raise ValueError(f"short={config.short}: stage 1 reads no captions")
    with process_group() as ranks:
        store = Store(manifests.read(dataset))
        done = checkpoints.steps(run)
        source = done[-1] if done else start and checkpoints.find(start)
        training = Training(checkpoints.load(source) if source else None, stage, model, config, store, ranks)
        loader = Loader(
            store,
            batch=config.batch,
            seed=config.seed,
            drop=config.drop,
            short=config.short,
            states=stage == 2,
            rank=ranks.rank,
            world=ranks.world,
        )
        interval = Interval(config, ranks)
        saved = Path(source) if source else None
        for batch in loader.iterate(training.steps_done, config.steps):
            interval.add(*training.step(batch))
            step = training.steps_done
            if step % config.log_every == 0 or step == config.steps:
                metrics = interval.metrics(step)
                if ranks.first:
                    report(step, metrics)
            level = ranks.agree(stop())
            if step % config.save_every == 0 or step == config.steps or level:
                saved = run / "checkpoints" / f"step-{step:08d}"
                state = training.checkpoint()
                if ranks.first:
                    checkpoints.save(state, saved)
                dist.barrier()
            if level and step < config.steps:
                raise Stopped(level)
        assert saved is not None  # a configuration has one step at least, and the last is saved
        return saved


class Interval:
    """Sums what is logged, without a synchronization in the steps between."""

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        self.clear()

    def clear(self) -> None:
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.since = time.perf_counter()

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self.losses.append(loss)
        self.norms.append(norm)

    def metrics(self, step: int) -> dict[str, float]:
        """Means over the interval, the loss over all ranks too; every rank must call it."""
        loss = torch.stack(self.losses).mean()
        dist.all_reduce(loss)
        norm = torch.stack([whole(norm) for norm in self.norms]).mean()
        seconds = (time.perf_counter() - self.since) / len(self.losses)
        self.clear()
        return {
            "train/loss": loss.item() / self.ranks.world,
            "train/grad_norm": norm.item(),
            "train/lr": learning_rate(step - 1, self.config),
            "train/seconds_per_step": seconds,
            "train/images_per_second": self.config.batch / seconds,
        }


class ClassCondition:
    """Stage 1: the class, or "no class" where it is dropped or not known."""

    def __init__(self, model: DiT, device: torch.device) -> None:
        self.none, self.device = model.config.num_classes - 1, device

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        label, dropped = (tensor.to(self.device, non_blocking=True) for tensor in (batch.label.long(), batch.dropped))
        return {"label": torch.where(dropped | (label < 0), self.none, label)}


class TextCondition:
    """Stage 2: the caption's states, from the store or from the encoder, or those of the empty text."""

    def __init__(self, dataset: manifests.Manifest, device: torch.device) -> None:
        from pixart.data.text import TextEncoder

        data = dataset.data
        encoder = TextEncoder(data.text_encoder, tokens=data.text_tokens, scale=data.text_scale)
        self.null_states, self.null_mask = (tensor.to(device) for tensor in encoder.encode([""]))
        self.null_length = int(self.null_mask.sum())
        self.encoder, self.device = None if data.text_states else encoder, device

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        dropped = batch.dropped.to(self.device, non_blocking=True)
        mask = torch.where(dropped[:, None], self.null_mask, batch.token_mask.to(self.device, non_blocking=True))
        if self.encoder:
            states = self.encoder.states(batch.token_ids, batch.token_mask)
        else:
            assert batch.text_states is not None  # the manifest says that the store keeps them
            states = batch.text_states.to(self.device, non_blocking=True).float()
        # Padding is on the right, and keys that no caption has are left out: counted on the CPU, without a wait.
        longest = max(int(batch.token_mask.sum(1).max()), self.null_length)
        states = torch.where(dropped[:, None, None], self.null_states, states)
        return {"text": states[:, :longest], "text_mask": mask[:, :longest]}


def step_generator(seed: int, step: int, rank: int) -> torch.Generator:
    """Random numbers of one step of one rank: nothing to save, and a resumed run draws the same."""
    digest = hashlib.sha256(f"{seed} {step} {rank}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


def statistics(store: Store) -> dict[str, tuple[float, ...]]:
    mean, std = store.statistics()
    return {"mean": mean, "std": std}


def fresh_model(stage: int, model: ModelConfig, dataset: manifests.Manifest) -> DiT:
    sizes = dataclasses.asdict(model)
    classes = sizes.pop("num_classes")
    return DiT(**sizes, **({"num_classes": classes} if stage == 1 else {"text_dim": dataset.text_dim}))


def check_fits(model: DiT, dataset: manifests.Manifest, stage: int) -> None:
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
