"""Train stage 1 (class-conditional) or stage 2 (text-conditional).

Starts a new run, from random weights or from a checkpoint (--from), or continues a run (--resume). The demo's dataset
is created first if it does not exist.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from conversion.options import STATEFUL
from jobs.commands.data.dataset import prepare_dataset, require_audit
from jobs.commands.hints import describe_submission, next_command
from jobs.commands.launching import launching, override_recipe, read_recipe, read_run_recipe
from jobs.commands.options import DATASET_KEY, Command, RecipeOptions, SubmissionOptions, option, positive
from jobs.commands.training.start_recipe import recipe_of_checkpoint
from jobs.reports.run_pages import SUMMARY
from jobs.state import ledger
from jobs.state import run as runs
from jobs.state.checkpoint_names import checkpoint_record
from jobs.state.run import Run
from jobs.submission.datasets import open_dataset
from jobs.submission.launch import Launch
from jobs.submission.preflight import (
    check_acceptance,
    check_bucket_rows,
    check_configuration,
    check_dataset,
    check_resumed_shapes,
    check_start,
    find_start,
)
from jobs.submission.submit import run_ranks
from pixart.config.keys.overrides import apply
from pixart.config.recipe import Recipe
from slurm.executor import Cluster
from slurm.sbatch import Shape

# Keys of a stage's configuration that MLflow and the run's summary page show.
LOGGED_KEYS = ("steps", "global_batch_size", "lr", "precision", "fp8", "ema_decay", "cond_dropout_prob")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(RecipeOptions, SubmissionOptions):
    """The options of every command that trains."""

    TITLE = "training"

    nodes: int = option(
        "--nodes",
        metavar="N",
        default=1,
        convert=positive,
        help="Number of nodes; on this machine, number of ranks (default: 1).",
    )
    preflight: bool = option(
        "--preflight",
        default=False,
        help="Check the nodes before training, and requeue the job without bad ones (default: beyond one node of a "
        "cluster).",
    )
    no_preflight: bool = option(
        "--no-preflight", default=False, help="Train without a check of the nodes (default: check beyond one node)."
    )
    accept_failed_audit: bool = option(
        "--accept-failed-audit",
        default=False,
        help="Train on a dataset that has not passed an audit (default: refuse it).",
    )


@dataclass(frozen=True, kw_only=True)
class Options(TrainingOptions):
    """The options of `train`."""

    stage: Literal[1, 2] | None = option(
        "--stage", metavar="STAGE", help="Stage: 1 for classes, 2 for text (default: the checkpoint's stage, else 1)."
    )
    start: str | None = option(
        "--from",
        metavar="CHECKPOINT",
        help="Checkpoint, or run with one, to start from, with its recipe unless --recipe or --config names one "
        "(default: random weights).",
    )
    resume: str | None = option(
        "--resume", metavar="RUN", help="Run folder to continue, with its own recipe (default: start a new run)."
    )
    accept_failed_conversion: bool = option(
        "--accept-failed-conversion",
        default=False,
        help="Start from a checkpoint whose conversion failed its acceptance checks (default: refuse it).",
    )


def run(options: Options) -> int:
    home = runs.home(options.home)
    start, resume = (name and runs.run_folder(home, name) for name in (options.start, options.resume))
    options = replace(options, start=start, resume=resume)
    recipe = read_training_recipe(home, options)
    with launching("train", options, home, recipe, overrides=options.overrides) as launch:
        print(train(launch, options))
    return 0


def read_training_recipe(home: Path, options: Options) -> Recipe:
    """Return the recipe of the options, of the resumed run or of the checkpoint, with the overrides of the options.

    Raises ValueError if no recipe fits the checkpoint, or if --recipe names another recipe than the run's.
    """
    if options.resume is None:
        if options.start and not options.recipe and not options.config:
            return override_recipe(recipe_of_checkpoint(home, options.start, named_dataset(options)), options)
        return read_recipe(home, options)
    recipe = read_run_recipe(Path(options.resume))
    if options.recipe not in (None, recipe.name):
        raise ValueError(f"--recipe {options.recipe}: {options.resume} is a run of the recipe {recipe.name}")
    return override_recipe(recipe, options)


def named_dataset(options: Options) -> str | None:
    """Return the dataset that the options name, by --dataset or by its key; None if they name none."""
    by_key = [item.removeprefix(DATASET_KEY) for item in options.overrides if item.startswith(DATASET_KEY)]
    return options.dataset or (by_key[-1] if by_key else None)


def train(launch: Launch, options: Options) -> str:
    """Check everything that can be checked before the job runs, prepare the dataset, and submit training."""
    preflight = with_preflight(launch, options)
    shape = training_shape(launch, options.nodes)
    Cluster(launch.profile, launch.home).check(shape)
    start, resumed = find_start(options.start, options.resume)
    record = checkpoint_record(start) if start else None
    stage = options.stage or (record["stage"] if record else 1)
    if start and record:
        check_start(launch.recipe, start, record, stage, options.overrides)
        if options.start and not options.accept_failed_conversion:
            check_acceptance(start, record)
    gpus = launch.profile.gpus_per_node > 0
    check_configuration(launch.recipe, stage, shape.nodes * shape.ranks_per_node, record, gpus=gpus)
    if record and record["plan"] and not launch.recipe.train(stage).fp8:
        hint = f"its plan and scales are not used; --set stage{stage}.fp8=true keeps them"
        print(f"warning: training continues without FP8 from the FP8 checkpoint {start}; {hint}", file=sys.stderr)
    if record and record["dataset"] and not options.names_dataset and ledger.manifest(record["dataset"]):
        launch.recipe = apply(launch.recipe, [f"{DATASET_KEY}{record['dataset']}"])
    if launch.recipe.data.source != "demo" and not launch.dry_run and ledger.manifest(launch.dataset) is None:
        raise ValueError(f"dataset {launch.dataset} does not exist; run 'caption' to create it")
    manifest = open_dataset(launch)
    if not launch.dry_run:
        check_dataset(launch.recipe, stage, manifest, record)
        check_bucket_rows(launch.dataset, shape.nodes * shape.ranks_per_node)
        if resumed and record:
            check_resumed_shapes(launch.recipe, resumed, record)
    after = prepare_dataset(launch, manifest)
    if not options.accept_failed_audit:
        after = require_audit(launch, after)
    submitted = submit_training(
        launch,
        stage,
        options.nodes,
        start=None if resumed else start,
        folder=resumed,
        after=after,
        require_audit=not options.accept_failed_audit,
        preflight=preflight,
    )
    if not launch.wait:
        return describe_submission(options, submitted)
    last = runs.result(submitted)
    following = conversion_command(launch, options, last) if stage == 1 else sampling_command(launch, options, last)
    return f"trained stage {stage}: checkpoint {last}\nsummary: {submitted.folder}/{SUMMARY}\nnext: {following}"


def conversion_command(launch: Launch, options: Options, checkpoint: str) -> str:
    """Return the command that converts a checkpoint: on a cluster by a job, else in the process of the command."""
    fp8_recipe = launch.recipe.stage2.fp8_recipe
    words = [checkpoint, *(["--fp8-recipe", fp8_recipe] if fp8_recipe != STATEFUL else [])]
    if options.cluster or launch.profile.executor == "slurm":
        return next_command(options, "convert", *words)
    return shlex.join(["python", "-m", "conversion.to_fp8", *words])


def sampling_command(launch: Launch, options: Options, checkpoint: str) -> str:
    """Return the command that samples a checkpoint with the recipe that it was trained with."""
    return next_command(options, "sample", checkpoint, recipe=launch.recipe.name, sections=("data.", "sample."))


def submit_training(
    launch: Launch,
    stage: int,
    nodes: int,
    *,
    start: Path | None,
    require_audit: bool,
    preflight: bool,
    folder: Path | None = None,
    after: Sequence[str] = (),
) -> Run:
    """Submit a training job: a new run from the checkpoint `start`, or the next job of the run in `folder`.

    With `require_audit`, the job checks at its start that the dataset has passed its audit; with `preflight`, it
    checks its nodes.
    """
    config = launch.recipe.train(stage)
    return run_ranks(
        launch,
        training_shape(launch, nodes),
        {
            "stage": stage,
            "start": str(start) if start else None,
            "require_audit": require_audit,
            "preflight": preflight,
        },
        parameters={
            "stage": stage,
            "nodes": nodes,
            "dataset": launch.dataset,
            **{name: getattr(config, name) for name in LOGGED_KEYS},
            **{name: getattr(launch.recipe.model, name) for name in ("dim", "num_blocks")},
        },
        tags={"pixart.parent_checkpoint": str(start)} if start else {},
        total=config.steps,
        folder=folder,
        after=after,
    )


def with_preflight(launch: Launch, options: TrainingOptions) -> bool:
    """Return whether training checks its nodes first. Raises ValueError if the options contradict each other."""
    if options.preflight and options.no_preflight:
        raise ValueError("--preflight and --no-preflight contradict each other; give only one of them")
    if options.preflight and launch.profile.executor == "local":
        raise ValueError(f"--preflight: the profile {launch.profile.name} has no nodes to choose from; leave it out")
    default = launch.profile.executor == "slurm" and options.nodes > 1
    return options.preflight or (default and not options.no_preflight)


def training_shape(launch: Launch, nodes: int) -> Shape:
    """Return the shape of a training job: one rank for each GPU of the nodes."""
    return Cluster(launch.profile, launch.home).ranks_shape("train", nodes, None)


def last_checkpoint(launch: Launch, stage: int, run: Run) -> Path:
    """Return the path of the last checkpoint that a training run will write."""
    return run.folder / "checkpoints" / f"step-{launch.recipe.train(stage).steps:08d}"


COMMAND = Command(Options, run)
