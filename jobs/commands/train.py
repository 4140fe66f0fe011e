"""The command that trains: what it checks, makes first and submits."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.commands.dataset import prepare_dataset, require_audit
from jobs.reports.run_pages import SUMMARY
from jobs.state import ledger
from jobs.state import run as runs
from jobs.state.checkpoint_names import checkpoint_record
from jobs.state.run import Run
from jobs.submission.datasets import use_dataset
from jobs.submission.launch import Launch
from jobs.submission.preflight import check_configuration, check_dataset, check_start, find_start
from jobs.submission.submit import describe_submission, run_ranks
from pixart.config import overrides
from slurm.executor import Cluster, Shape

# What MLflow and the run's page show of a stage's configuration.
LOGGED_KEYS = ("steps", "global_batch_size", "lr", "precision", "fp8", "ema_decay", "cond_dropout_prob")


def train_command(launch: Launch, options: argparse.Namespace) -> str:
    shape = training_shape(launch, options.nodes)
    Cluster(launch.profile, launch.home).check(shape)
    start, resumed = find_start(options)
    record = checkpoint_record(start) if start else None
    stage = options.stage or (record["stage"] if record else 1)
    if record:
        check_start(launch.recipe, options, start, record, stage)
    gpus = launch.profile.gpus_per_node > 0
    check_configuration(launch.recipe, stage, shape.nodes * shape.ranks_per_node, record, gpus=gpus)
    if record and record["plan"] and not launch.recipe.train(stage).fp8:
        hint = f"its plan and its scales are left behind; --set stage{stage}.fp8=true keeps them"
        print(f"goes on without FP8, though {start} is in FP8: {hint}", file=sys.stderr)
    names_data = options.dataset or any(item.startswith("data.path=") for item in options.overrides)
    if record and record["dataset"] and not names_data and ledger.manifest(record["dataset"]):
        launch.recipe = overrides.apply(launch.recipe, [f"data.path={record['dataset']}"])
    if launch.recipe.data.source != "demo" and not launch.dry_run and ledger.manifest(launch.dataset) is None:
        raise ValueError(f"dataset {launch.dataset}: there is none; caption makes it")
    manifest = use_dataset(launch, options.overrides)
    if not launch.dry_run:
        check_dataset(launch.recipe, stage, manifest, record)
    after = prepare_dataset(launch, manifest)
    if not options.accept_failed_audit:
        after = require_audit(launch, after)
    run = submit_training(launch, stage, options.nodes, start=None if resumed else start, folder=resumed, after=after)
    if not launch.wait:
        return describe_submission(run)
    last = runs.result(run)
    following = f"python -m conversion.to_fp8 {last}" if stage == 1 else f"python -m jobs.launch sample {last}"
    page = f"{run.folder}/{SUMMARY}"
    return f"trained stage {stage}: checkpoint {last}\nsummary: {page}\nnext: {following}"


def submit_training(
    launch: Launch,
    stage: int,
    nodes: int,
    *,
    start: Path | None,
    folder: Path | None = None,
    after: Sequence[str] = (),
) -> Run:
    config = launch.recipe.train(stage)
    return run_ranks(
        launch,
        training_shape(launch, nodes),
        {"stage": stage, "start": str(start) if start else None},
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


def training_shape(launch: Launch, nodes: int) -> Shape:
    return Cluster(launch.profile, launch.home).ranks_shape("train", nodes, None)


def last_checkpoint(launch: Launch, stage: int, run: Run) -> Path:
    """Where a training run puts its last checkpoint, known before it has begun."""
    return run.folder / "checkpoints" / f"step-{launch.recipe.train(stage).steps:08d}"
