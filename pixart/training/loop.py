"""The training loop of either stage: steps, logging, validation, previews, checkpoints, resume."""

from collections.abc import Callable, Sequence
from pathlib import Path

from pixart.checkpoint import directory as checkpoints
from pixart.config.latent_space import check_image_shapes
from pixart.config.model import ModelConfig
from pixart.config.training import TrainConfig
from pixart.data import manifest as manifests
from pixart.data.loading.loader import Loader
from pixart.data.loading.sampler import select_validation_rows
from pixart.data.store.zarr_store import Store
from pixart.training.checkpointing import CheckpointManager, find_newest_valid, restore, run_lock, verify
from pixart.training.metrics import MetricsLogger, NullReporter, Reporter
from pixart.training.preview import PreviewSampler
from pixart.training.process_group import Ranks, process_group
from pixart.training.trainer import Trainer
from pixart.training.validation import Validator
from pixart.training.watchdog import HangWatchdog, StepProfiler


class Stopped(Exception):  # noqa: N818 - not an error
    """Training stopped early on request, after saving; `level` is the largest that any rank was asked with."""

    def __init__(self, level: int) -> None:
        super().__init__(f"training stopped on request (level {level})")
        self.level = level


def train(
    *,
    stage: int,
    model: ModelConfig,
    config: TrainConfig,
    dataset: str,
    run: str | Path,
    start: str | Path | None = None,
    recipe: str | None = None,
    reporter: Reporter | None = None,
    stop: Callable[[], int] = lambda: 0,
    preview_prompts: Sequence[str] = (),
    on_evaluation: Callable[[Path], None] | None = None,
) -> Path:
    """Train until `config.steps` and return the directory of the last checkpoint; every rank must call it.

    The run is resumed from its newest valid checkpoint; without one, training starts from the checkpoint `start`, or
    from new weights. Checkpoints record the name of the recipe, if it is given. `reporter` receives metrics on rank 0.
    Previews of stage 2 show `preview_prompts` in place of captions of the dataset. `on_evaluation` is called on rank 0,
    in another thread, with each complete checkpoint that `config.evaluate_every` selects.
    When `stop` returns a nonzero level on any rank, all ranks save after the same step and raise Stopped.

    Raises ValueError for errors in the configuration, the dataset or the checkpoint.
    """
    run, reporter = Path(run), reporter or NullReporter()
    with (
        process_group() as ranks,
        run_lock(run, ranks),
        HangWatchdog(config.hang_timeout_minutes) as watchdog,
    ):
        check_config(stage, config, ranks)
        store = Store(manifests.read(dataset))
        checkpoint, errors = find_newest_valid(run, ranks)
        if checkpoint:
            check_image_shapes(
                str(run), checkpoints.load_without_tensors(checkpoint).provenance, dataset, store.manifest.image_shapes
            )
        if checkpoint is None and start:
            checkpoint = checkpoints.find(start)
            verify(checkpoint, ranks)
        metadata = checkpoints.load_without_tensors(checkpoint) if checkpoint else None
        trainer = Trainer(metadata, stage, model, config, store, ranks)
        if recipe:
            trainer.provenance = {**trainer.provenance, "recipe": recipe}
        if checkpoint:
            restore(trainer, checkpoint)
        for error in errors:
            reporter.incident(trainer.steps_done, error)
        valid_rows = store.valid_rows()
        validation_rows = select_validation_rows(valid_rows, config.num_validation_samples)
        loader = Loader(
            store,
            global_batch_size=config.global_batch_size,
            seed=config.seed,
            cond_dropout_prob=config.cond_dropout_prob,
            short_caption_prob=config.short_caption_prob,
            text_embeddings=stage == 2,
            rank=ranks.rank,
            world_size=ranks.world_size,
            excluded_rows=validation_rows,
        )
        metrics = MetricsLogger(trainer, loader.order, reporter)
        manager = CheckpointManager(
            run,
            ranks,
            keep_last=config.keep_last,
            keep_every=config.keep_every,
            evaluate_every=config.evaluate_every,
            on_evaluation=on_evaluation,
        )
        validator = Validator(trainer, store, validation_rows) if len(validation_rows) else None
        preview_rows = (validation_rows if len(validation_rows) else valid_rows)[: config.num_previews]
        previews = None
        if config.preview_every:
            prompts = preview_prompts[: config.num_previews] if stage == 2 else ()
            previews = PreviewSampler(trainer, store, preview_rows, run, prompts)
        profiler = StepProfiler(run, config.profile_step if ranks.is_first else 0)

        def is_due(every: int) -> bool:
            return every > 0 and (trainer.steps_done % every == 0 or trainer.steps_done == config.steps)

        for batch in metrics.time_data_loading(loader.iterate(trainer.steps_done, config.steps)):
            if trace := profiler.step_begins(trainer.steps_done + 1):
                reporter.artifact(trace)
            metrics.add(batch, *trainer.train_step(batch))
            watchdog.step_ended()
            stop_level = ranks.all_reduce_max(stop())
            save_due = is_due(config.save_every) or stop_level > 0
            if is_due(config.log_every) or save_due:
                metrics.log()
            if trainer.plan and is_due(config.fp8_log_every):
                metrics.log_fp8_metrics()
            with metrics.exclude_from_timing():
                if validator and is_due(config.validate_every):
                    losses = validator.evaluate()
                    if ranks.is_first:
                        reporter.metrics(trainer.steps_done, losses)
                if previews and is_due(config.preview_every):
                    previews.sample(reporter.artifact)
                if save_due:
                    checkpoint = manager.save(trainer)
            if stop_level and trainer.steps_done < config.steps:
                break
        manager.close()
        if previews:
            previews.close()
        ranks.barrier()  # no rank ends before the checkpoint is complete
        if trainer.steps_done < config.steps:
            raise Stopped(stop_level)
        assert checkpoint is not None  # a configuration has at least one step, and the last one is saved
        return checkpoint


def check_config(stage: int, config: TrainConfig, ranks: Ranks) -> None:
    """Raise ValueError for a configuration that does not fit the stage or the number of ranks."""
    if stage == 1 and config.short_caption_prob > 0:
        raise ValueError(
            f"stage1.short_caption_prob={config.short_caption_prob}: stage 1 reads no captions; set it to 0"
        )
    if config.global_batch_size % (ranks.world_size * config.gradient_accumulation_steps):
        raise ValueError(
            f"global_batch_size={config.global_batch_size}: must be divisible by {ranks.world_size} ranks times "
            f"{config.gradient_accumulation_steps} micro-batches"
        )
