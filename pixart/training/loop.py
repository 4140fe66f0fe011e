"""Training of either stage: rectified flow, FSDP2, AdamW, EMA, FP8 by plan, checkpoints, resume."""

from collections.abc import Callable
from pathlib import Path

from pixart.checkpoint import directory as checkpoints
from pixart.config.model import ModelConfig
from pixart.config.training import TrainConfig
from pixart.data import manifest as manifests
from pixart.data.loading.loader import Loader
from pixart.data.loading.sampler import held_out_rows
from pixart.data.store.zarr_store import Store
from pixart.training.checkpointing import Saver, newest_whole, restore
from pixart.training.metrics import Interval, Quiet, Reporter
from pixart.training.preview import Previews
from pixart.training.process_group import Ranks, process_group
from pixart.training.trainer import Training
from pixart.training.validation import Validation
from pixart.training.watchdog import Profile, Watch


class Stopped(Exception):  # noqa: N818 - no error
    """Training has ended early, saved at a step boundary; `level` is the largest that any rank was asked with."""

    def __init__(self, level: int) -> None:
        super().__init__(f"stopped by request of level {level}")
        self.level = level


def train(
    *,
    stage: int,
    model: ModelConfig,
    config: TrainConfig,
    dataset: str,
    run: str | Path,
    start: str | Path | None = None,
    reporter: Reporter | None = None,
    stop: Callable[[], int] = lambda: 0,
) -> Path:
    """Trains to `config.steps` and returns the last checkpoint's directory.

    A run folder that has checkpoints is resumed from the newest whole one; else training goes on from `start`, or
    begins afresh. Every rank calls this; rank 0 tells `reporter`. Where `stop` is not 0 on any rank, all save after
    the same step and raise Stopped. Raises ValueError for what the user can mend.
    """
    run, reporter = Path(run), reporter or Quiet()
    with process_group() as ranks, Watch(config.hang_timeout_minutes) as watch:
        check(stage, config, ranks)
        store = Store(manifests.read(dataset))
        source, faults = newest_whole(run, ranks)
        if source is None and start:
            source = checkpoints.find(start)
        training = Training(checkpoints.describe(source) if source else None, stage, model, config, store, ranks)
        if source:
            restore(training, source)
        for fault in faults:
            reporter.incident(training.steps_done, fault)
        valid = store.valid_rows()
        held_out = held_out_rows(valid, config.num_validation_samples)
        loader = Loader(
            store,
            batch=config.global_batch_size,
            seed=config.seed,
            drop=config.cond_dropout_prob,
            short=config.short_caption_prob,
            states=stage == 2,
            rank=ranks.rank,
            world=ranks.world,
            held_out=held_out,
        )
        interval = Interval(training, loader.order, reporter)
        saver = Saver(run, ranks, keep_last=config.keep_last, keep_every=config.keep_every)
        validation = Validation(training, store, held_out) if len(held_out) else None
        shown = (held_out if len(held_out) else valid)[: config.num_previews]
        previews = Previews(training, store, shown, run) if config.preview_every else None
        profile = Profile(run, config.profile_step if ranks.first else 0)

        def due(every: int) -> bool:
            return every > 0 and (training.steps_done % every == 0 or training.steps_done == config.steps)

        for batch in interval.timed(loader.iterate(training.steps_done, config.steps)):
            if trace := profile.step_begins(training.steps_done + 1):
                reporter.artifact(trace)
            interval.add(*training.step(batch))
            watch.step_ended()
            level = ranks.agree(stop())
            saving = due(config.save_every) or level > 0
            if due(config.log_every) or saving:
                interval.tell()
            if training.plan and due(config.fp8_log_every):
                interval.tell_scales()
            with interval.aside():
                if validation and due(config.validate_every):
                    losses = validation.losses()
                    if ranks.first:
                        reporter.metrics(training.steps_done, losses)
                if previews and due(config.preview_every):
                    previews.make(reporter.artifact)
                if saving:
                    source = saver.save(training)
            if level and training.steps_done < config.steps:
                break
        saver.close()
        if previews:
            previews.close()
        ranks.agree(0)  # no rank ends before the checkpoint of all has its name
        if training.steps_done < config.steps:
            raise Stopped(level)
        assert source is not None  # a configuration has one step at least, and the last is saved
        return source


def check(stage: int, config: TrainConfig, ranks: Ranks) -> None:
    """Raises ValueError for a configuration that cannot work with this stage or these ranks."""
    if stage == 1 and config.short_caption_prob > 0:
        raise ValueError(f"stage1.short_caption_prob={config.short_caption_prob}: stage 1 reads no captions")
    if config.global_batch_size % (ranks.world * config.gradient_accumulation_steps):
        raise ValueError(
            f"global_batch_size={config.global_batch_size}: does not divide over {ranks.world} ranks and "
            f"{config.gradient_accumulation_steps} micro-batches"
        )
