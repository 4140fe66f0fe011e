"""Submit every job from captions to samples, each after the one before.

The jobs are caption, latents, audit, stage 1, conversion, stage 2 and sample. Each starts when the one before it has
succeeded.
"""

import functools

from conversion.options import Options as ConversionOptions
from conversion.options import default_output
from jobs.commands.data.dataset import prepare_dataset, require_audit
from jobs.commands.hints import next_command
from jobs.commands.launching import launching, read_recipe
from jobs.commands.options import Command
from jobs.commands.results.sampling import SamplingRequest, describe_samples, submit_sampling
from jobs.commands.training.convert import submit_conversion
from jobs.commands.training.train import (
    TrainingOptions,
    last_checkpoint,
    submit_training,
    training_shape,
    with_preflight,
)
from jobs.state import run as runs
from jobs.state.run import Run
from jobs.submission.datasets import open_dataset
from jobs.submission.launch import Launch, NothingSubmitted
from jobs.submission.preflight import check_dataset, check_pipeline
from jobs.submission.submit import array_shape, planned_cluster
from jobs.submission.wait import dependencies
from jobs.tracking.mlflow_store import Tracker
from pixart.config.recipe import to_json


def run(options: TrainingOptions) -> int:
    home = runs.home(options.home)
    with launching("pipeline", options, home, read_recipe(home, options), overrides=options.overrides) as launch:
        print(pipeline(launch, options))
    return 0


def pipeline(launch: Launch, options: TrainingOptions) -> str:
    """Submit the jobs, and describe them or, if the launcher waits, their results."""
    submitted = submit_pipeline(launch, options)
    if launch.wait:
        return describe_results(launch, options, submitted)
    lines = [f"{item.kind:<8} {', '.join(item.job_ids):<12} {item.folder}" for item in submitted]
    return "\n".join(["submitted, each to start when the one before it has succeeded:", *lines])


def submit_pipeline(launch: Launch, options: TrainingOptions) -> list[Run]:
    """Submit the jobs after the dataset is open; return the runs from stage 1 on."""
    shape = training_shape(launch, options.nodes)
    check_pipeline(launch.recipe, shape.nodes * shape.ranks_per_node, gpus=launch.profile.gpus_per_node > 0)
    if launch.dry_run:
        raise NothingSubmitted(describe_plan(launch, options.nodes))
    manifest = open_dataset(launch)
    for stage in (1, 2):
        check_dataset(launch.recipe, stage, manifest, None)
    after = prepare_dataset(launch, manifest, any_source=True)
    audited = not options.accept_failed_audit
    if audited:
        after = require_audit(launch, after, any_source=True)
    preflight = with_preflight(launch, options)
    stage1 = submit_training(
        launch, 1, options.nodes, start=None, after=after, require_audit=audited, preflight=preflight
    )
    source = last_checkpoint(launch, 1, stage1)
    converted = default_output(source)
    config = launch.recipe.stage2
    conversion_options = ConversionOptions(batch_size=config.global_batch_size, fp8_recipe=config.fp8_recipe)
    conversion = submit_conversion(launch, source, converted, conversion_options, dependencies(launch, stage1))
    stage2 = submit_training(
        launch,
        2,
        options.nodes,
        start=converted,
        after=dependencies(launch, conversion),
        require_audit=audited,
        preflight=preflight,
    )
    samples = submit_sampling(
        launch, SamplingRequest(checkpoint=last_checkpoint(launch, 2, stage2)), after=dependencies(launch, stage2)
    )
    return [stage1, conversion, stage2, samples]


def describe_results(launch: Launch, options: TrainingOptions, submitted: list[Run]) -> str:
    """Return the lines about the samples, the last checkpoint and the pages of a finished pipeline."""
    _, _, stage2, samples = submitted
    return (
        f"{describe_samples(runs.result(samples))}\ncheckpoint: {last_checkpoint(launch, 2, stage2)}\n"
        f"pages: {next_command(options, 'open', stage2.folder.name)}, "
        f"{next_command(options, 'lineage', samples.folder.name)}\n"
        f"runs: {describe_tracking(launch.tracker)}"
    )


def describe_tracking(tracker: Tracker) -> str:
    """Return the address of the experiment's page in MLflow, since MLflow's home page lists no runs."""
    if tracker.uri.startswith("http"):
        return tracker.uri
    return (
        f"mlflow ui --backend-store-uri {tracker.uri}, at http://127.0.0.1:5000/#/experiments/{tracker.experiment}/runs"
    )


def describe_plan(launch: Launch, nodes: int) -> str:
    """Return what a dry run prints: every submission, and the recipe. Raises ValueError as `Cluster.check` does."""
    cluster = planned_cluster(launch, after=["BEFORE"])
    shards = range(launch.recipe.data.num_shards)
    shapes = [array_shape(launch, kind, shards) for kind in ("caption", "latents")]
    training = cluster.ranks_shape("train", nodes, None)
    single = functools.partial(cluster.ranks_shape, nodes=1, ranks_per_node=1)
    shapes += [single("audit"), training, single("convert"), training, single("sample")]
    for shape in shapes:
        cluster.check(shape)
    return "\n".join(cluster.describe(shape) for shape in shapes) + "\n" + to_json(launch.recipe)


COMMAND = Command(TrainingOptions, run)
