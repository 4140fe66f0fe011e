"""The whole path by one command: captions, latents, audit, stage 1, conversion, stage 2, pictures."""

import argparse
import functools

from conversion.options import Options, default_output
from jobs.commands.convert import submit_conversion
from jobs.commands.dataset import prepare_dataset, require_audit
from jobs.commands.sample import describe_samples, submit_sampling
from jobs.commands.train import last_checkpoint, submit_training, training_shape
from jobs.state import run as runs
from jobs.state.run import Run
from jobs.submission.datasets import use_dataset
from jobs.submission.launch import Launch, NothingSubmitted
from jobs.submission.preflight import check_dataset, check_pipeline
from jobs.submission.submit import planned_cluster
from jobs.submission.wait import waited
from jobs.tracking.mlflow_store import Tracker
from pixart.config.recipe import to_json


def pipeline_command(launch: Launch, options: argparse.Namespace) -> str:
    """All jobs in turn; each waits for those before it."""
    submitted = run_pipeline(launch, options)
    if launch.wait:
        return describe_pipeline(launch, submitted)
    lines = [f"{run.kind:<8} {', '.join(run.job_ids):<12} {run.folder}" for run in submitted]
    return "\n".join(["submitted, each to begin when the one before it has succeeded:", *lines])


def run_pipeline(launch: Launch, options: argparse.Namespace) -> list[Run]:
    shape = training_shape(launch, options.nodes)
    check_pipeline(launch.recipe, shape.nodes * shape.ranks_per_node)
    if launch.dry_run:
        raise NothingSubmitted(describe_plan(launch, options))
    manifest = use_dataset(launch, options.overrides)
    check_dataset(launch.recipe, 1, manifest, None)
    after = prepare_dataset(launch, manifest, any_source=True)
    if not options.accept_failed_audit:
        after = require_audit(launch, after, any_source=True)
    stage1 = submit_training(launch, 1, options.nodes, start=None, after=after)
    source = last_checkpoint(launch, 1, stage1)
    how = Options(batch=launch.recipe.stage2.global_batch_size)
    conversion = submit_conversion(launch, source, default_output(source), how, waited(launch, stage1))
    start = default_output(source)
    stage2 = submit_training(launch, 2, options.nodes, start=start, after=waited(launch, conversion))
    last = last_checkpoint(launch, 2, stage2)
    samples = submit_sampling(launch, last, after=waited(launch, stage2))
    return [stage1, conversion, stage2, samples]


def describe_pipeline(launch: Launch, submitted: list[Run]) -> str:
    _, _, stage2, samples = submitted
    return (
        f"{describe_samples(runs.result(samples))}\ncheckpoint: {last_checkpoint(launch, 2, stage2)}\n"
        f"pages: python -m jobs.launch open {stage2.folder.name}, python -m jobs.launch lineage {samples.folder.name}\n"
        f"runs: {where_runs_are(launch.tracker)}"
    )


def where_runs_are(tracker: Tracker) -> str:
    """The page of runs by its address, for MLflow's own first page is one of chats."""
    if tracker.uri.startswith("http"):
        return tracker.uri
    return (
        f"mlflow ui --backend-store-uri {tracker.uri}, at http://127.0.0.1:5000/#/experiments/{tracker.experiment}/runs"
    )


def describe_plan(launch: Launch, options: argparse.Namespace) -> str:
    cluster = planned_cluster(launch, after=["BEFORE"])
    shards = range(launch.recipe.data.num_shards)
    shapes = [cluster.array_shape(kind, shards) for kind in ("caption", "latents")]
    training = cluster.ranks_shape("train", options.nodes, None)
    single = functools.partial(cluster.ranks_shape, nodes=1, ranks_per_node=1)
    shapes += [single("audit"), training, single("convert"), training, single("sample")]
    for shape in shapes:
        cluster.check(shape)
    return "\n".join(cluster.describe(shape) for shape in shapes) + "\n" + to_json(launch.recipe)
