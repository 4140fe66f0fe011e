"""What each command of the launcher does. Imports no torch: the jobs themselves do, where they run."""

import argparse
import functools
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from conversion.options import Options, default_output, from_arguments
from jobs import ledger, runs
from jobs.arrays import parse_array
from jobs.checkpoints import MARKER, find_checkpoint, find_weights
from jobs.runs import Run
from jobs.submission import (
    Launch,
    NothingSubmitted,
    begin_group,
    resubmit,
    run_array,
    run_ranks,
    use_dataset,
)
from jobs.tracking import set_status, sync_in_background
from pixart.config import Recipe, from_json, override, to_json
from pixart.recipes import RECIPES
from slurm import profile as profiles
from slurm.cluster import Cluster, Shape
from slurm.profile import Profile


def run(options: argparse.Namespace) -> int:
    """Runs the command that `options` names. Raises ValueError for what the user can mend, else JobFailedError."""
    launch = prepare(options)
    try:
        print(COMMANDS[options.job](launch, options))
    except NothingSubmitted as plan:
        print(plan)
    finally:
        if launch.folders and not launch.wait:
            sync_in_background(launch.home, launch.folders)
    return 0


def prepare(options: argparse.Namespace) -> Launch:
    home = Path(options.home or os.environ.get("PIXART_HOME") or "outputs").absolute()
    profile = profiles.load(options.cluster or profiles.default_name())
    if options.gpus_per_node:
        profile = replace(profile, gpus_per_node=options.gpus_per_node)
    wait = profile.executor == "local" or options.wait or options.job == "demo"
    return Launch(home=home, recipe=read_recipe(home, options), profile=profile, wait=wait, dry_run=options.dry_run)


def read_recipe(home: Path, options: argparse.Namespace) -> Recipe:
    if options.job == "retry":
        run = runs.find(home, options.run)
        return from_json((run.folder / "config.json").read_text())
    if options.settings not in RECIPES:
        raise ValueError(f"unknown recipe {options.settings!r}: it must be one of {', '.join(RECIPES)}")
    recipe = override(RECIPES[options.settings](str(home)), options.overrides)
    if options.dataset:
        recipe = override(recipe, [f"data.path={Path(options.dataset).absolute()}"])
    return recipe


def array_command(launch: Launch, options: argparse.Namespace) -> str:
    asked, limit = parse_array(options.array) if options.array is not None else (None, None)
    job = options.job
    manifest = use_dataset(launch, options.overrides)
    shards = check_shards(launch, manifest, asked)
    if job == "latents":
        require_captions(launch, shards)
    run = run_array(launch, job, shards, limit)
    if not launch.wait:
        return describe_submission(run)
    entries = ledger.entries(launch.dataset, job, shards)
    rows, valid = sum(entry.rows for entry in entries.values()), sum(entry.valid for entry in entries.values())
    place = {"caption": "captions", "latents": "latents.zarr"}[job]
    following = {"caption": "latents", "latents": "train --stage 1"}[job]
    return (
        f"{job}: {len(shards)} shards, {valid} of {rows} images valid, in {launch.dataset}/{place}\n"
        f"next: python -m jobs.launch {following} --dataset {launch.dataset}"
    )


def check_shards(launch: Launch, manifest: dict[str, Any], asked: list[int] | None) -> list[int]:
    shards = manifest["data"]["shards"]
    if asked is None:
        return list(range(shards))
    if asked[-1] >= shards:
        raise ValueError(
            f"--array: shard {asked[-1]} is not there, the dataset {launch.dataset} has shards 0 to {shards - 1}"
        )
    return asked


def require_captions(launch: Launch, shards: list[int]) -> None:
    there = ledger.entries(launch.dataset, "caption", shards)
    if missing := [shard for shard in shards if shard not in there]:
        raise ValueError(
            f"{len(missing)} of {len(shards)} shards have no captions yet, such as {missing[0]}: run caption first"
        )


def describe_submission(run: Run) -> str:
    return (
        f"submitted {run.kind} as {', '.join(run.job_ids)}; run folder {run.folder}\n"
        f"next: python -m jobs.launch status {run.folder.name}"
    )


def prepare_dataset(
    launch: Launch, overrides: list[str], *, any_source: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Runs what is missing of the two data jobs, so that training on the embedded default needs no step before it.

    Returns the manifest and the jobs to wait for.
    """
    manifest = use_dataset(launch, overrides)
    shards = check_shards(launch, manifest, None)
    after: list[str] = []
    for job in ("caption", "latents"):
        there = ledger.shards(launch.dataset, job)
        missing = [shard for shard in shards if shard not in there]
        if missing and not any_source and launch.recipe.data.source != "demo":
            raise ValueError(
                f"dataset {launch.dataset} is not whole: {job} lacks {len(missing)} of {len(shards)} shards"
            )
        if missing:
            print(f"{job} first: {len(missing)} of {len(shards)} shards of the dataset are not there yet", flush=True)
        if missing and not launch.dry_run:
            after = waited(launch, run_array(launch, job, missing, None, after))
    return manifest, after


def waited(launch: Launch, run: Run) -> list[str]:
    """The jobs that what comes after a run has to wait for: none, where the launcher itself has waited."""
    return [] if launch.wait else run.job_ids


def train_command(launch: Launch, options: argparse.Namespace) -> str:
    Cluster(launch.profile, launch.home).check(training_shape(launch, options.nodes))
    start = find_checkpoint(options.start) if options.start else None
    if options.start and options.resume:
        raise ValueError("--from begins a run and --resume continues one: give one of them")
    resumed = Path(options.resume).absolute() if options.resume else None
    if resumed and not (resumed / "config.json").exists():
        raise ValueError(f"--resume {options.resume}: no run folder")
    if resumed:
        start = find_checkpoint(str(resumed))
    record = json.loads((start / MARKER).read_text()) if start else None
    stage = options.stage or (record["stage"] if record else 1)
    if record and record["stage"] != stage:
        raise ValueError(
            f"{start} is of stage {record['stage']}, not {stage}: convert it first, or give --stage {record['stage']}"
        )
    failed = options.start and record and record["provenance"].get("gate") == "FAIL"
    if failed and not options.accept_failed_conversion:
        raise ValueError(
            f"{start} comes from a conversion that failed its checks (see its report.html): mend that, or give "
            "--accept-failed-conversion"
        )
    config = launch.recipe.train(stage)
    if config.fp8 and not (record and record["plan"]):
        raise ValueError(
            f"stage {stage} trains in FP8, from a checkpoint that `python -m conversion.to_fp8` wrote: "
            f"name it by --from, or set stage{stage}.fp8=false"
        )
    ranks = options.nodes * max(1, launch.profile.gpus_per_node)
    if config.batch % ranks:
        raise ValueError(f"stage{stage}.batch={config.batch} does not divide over {ranks} ranks")
    if record and record["step"] >= config.steps:
        raise ValueError(
            f"{start} has done {record['step']} steps, stage{stage}.steps={config.steps} leaves none to train"
        )
    names_data = options.dataset or any(item.startswith("data.path=") for item in options.overrides)
    if record and record["dataset"] and not names_data and Path(record["dataset"]).exists():
        launch.recipe = override(launch.recipe, [f"data.path={record['dataset']}"])
    manifest, after = prepare_dataset(launch, options.overrides)
    classes = len(manifest["class_names"])
    if stage == 1 and not start and classes >= launch.recipe.model.num_classes:
        raise ValueError(
            f"model.num_classes={launch.recipe.model.num_classes}: the dataset has {classes} classes, and one more "
            f"index means no class; give --set model.num_classes={classes + 1}"
        )
    run = submit_training(launch, stage, options.nodes, start=None if resumed else start, folder=resumed, after=after)
    if not launch.wait:
        return describe_submission(run)
    last = runs.result(run)
    following = f"python -m conversion.to_fp8 {last}" if stage == 1 else f"python -m jobs.launch sample {last}"
    return f"trained stage {stage}: checkpoint {last}\nnext: {following}"


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
            **{name: getattr(config, name) for name in ("steps", "batch", "lr", "precision", "fp8", "ema", "drop")},
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


def convert_command(launch: Launch, options: argparse.Namespace) -> str:
    source = Path(options.checkpoint).absolute()
    if not source.exists():
        raise ValueError(f"checkpoint {options.checkpoint}: no such file or directory")
    if source.is_dir():
        source = find_checkpoint(str(source))
    target = Path(options.output).absolute() if options.output else default_output(source)
    how = from_arguments(options)
    if target.exists() and not how.overwrite:
        raise ValueError(f"{target} exists: name another --output, or give --overwrite")
    run = submit_conversion(launch, source, target, how)
    if not launch.wait:
        return describe_submission(run)
    return f"converted: {target}\nnext: python -m jobs.launch train --stage {how.stage} --from {target}"


def submit_conversion(launch: Launch, source: Path, target: Path, how: Options, after: Sequence[str] = ()) -> Run:
    """The job replaces what it finds: it may be run again where it was cut short."""
    options = {**asdict(how), "overwrite": True}
    return run_ranks(
        launch,
        Cluster(launch.profile, launch.home).ranks_shape("convert", 1, 1),
        {"source": str(source), "output": str(target), "options": options},
        parameters={"source": str(source), **options},
        tags={"pixart.parent_checkpoint": str(source)},
        total=1,
        after=after,
    )


def sample_command(launch: Launch, options: argparse.Namespace) -> str:
    checkpoint, record = find_weights(options.checkpoint)
    if not record["dataset"]:
        raise ValueError(f"{checkpoint} names no dataset, so its VAE and text encoder are not known: train it first")
    launch.recipe = override(launch.recipe, [f"data.path={record['dataset']}"])
    use_dataset(launch, [])
    run = submit_sampling(launch, checkpoint, options.prompt)
    return describe_samples(runs.result(run)) if launch.wait else describe_submission(run)


def submit_sampling(launch: Launch, checkpoint: Path, prompts: list[str], after: Sequence[str] = ()) -> Run:
    return run_ranks(
        launch,
        Cluster(launch.profile, launch.home).ranks_shape("sample", 1, 1),
        {"checkpoint": str(checkpoint), "prompts": prompts},
        parameters={"checkpoint": str(checkpoint), "guidance": launch.recipe.sample.guidance},
        tags={"pixart.parent_checkpoint": str(checkpoint)},
        total=1,
        after=after,
    )


def describe_samples(result: dict[str, Any]) -> str:
    lines = [f"sampled: {result['sheet']}"]
    if "color" in result:
        lines.append(
            f"counted: main colour right in {result['color']:.0%}, main shape in {result['shape']:.0%} "
            f"of {result['prompts']} prompts that training has not seen"
        )
    return "\n".join(lines)


def pipeline_command(launch: Launch, options: argparse.Namespace) -> str:
    """All jobs in turn, their runs under one parent in MLflow; each waits for those before it."""
    submitted = run_pipeline(launch, options)
    if launch.wait:
        return describe_pipeline(launch, submitted)
    lines = [f"{run.kind:<8} {', '.join(run.job_ids):<12} {run.folder}" for run in submitted]
    return "\n".join(["submitted, each to begin when the one before it has succeeded:", *lines])


def run_pipeline(launch: Launch, options: argparse.Namespace) -> list[Run]:
    if launch.dry_run:
        raise NothingSubmitted(describe_plan(launch, options))
    folder = begin_group(launch, options.job)
    launch.parent = folder
    succeeded = False
    try:
        _, after = prepare_dataset(launch, options.overrides, any_source=True)
        stage1 = submit_training(launch, 1, options.nodes, start=None, after=after)
        source = last_checkpoint(launch, 1, stage1)
        how = Options(batch=launch.recipe.stage2.batch)
        conversion = submit_conversion(launch, source, default_output(source), how, waited(launch, stage1))
        start = default_output(source)
        stage2 = submit_training(launch, 2, options.nodes, start=start, after=waited(launch, conversion))
        last = last_checkpoint(launch, 2, stage2)
        samples = submit_sampling(launch, last, [], waited(launch, stage2))
        succeeded = True
    finally:
        set_status(folder, "FINISHED" if succeeded else "FAILED")
        if launch.wait:
            launch.tracker.sync(folder)
    return [stage1, conversion, stage2, samples]


def describe_pipeline(launch: Launch, submitted: list[Run]) -> str:
    _, _, stage2, samples = submitted
    return (
        f"{describe_samples(runs.result(samples))}\ncheckpoint: {last_checkpoint(launch, 2, stage2)}\n"
        f"runs: mlflow ui --backend-store-uri {launch.tracker.uri}"
    )


def describe_plan(launch: Launch, options: argparse.Namespace) -> str:
    cluster = Cluster(launch.profile, launch.home / "runs" / "RUN", after=["BEFORE"])
    shards = range(launch.recipe.data.shards)
    shapes = [cluster.array_shape(kind, shards) for kind in ("caption", "latents")]
    training, single = (
        cluster.ranks_shape("train", options.nodes, None),
        functools.partial(cluster.ranks_shape, nodes=1),
    )
    shapes += [training, single("convert", ranks_per_node=1), training, single("sample", ranks_per_node=1)]
    for shape in shapes:
        cluster.check(shape)
    return "\n".join(cluster.describe(shape) for shape in shapes) + "\n" + to_json(launch.recipe)


def retry_command(launch: Launch, options: argparse.Namespace) -> str:
    run = runs.find(launch.home, options.run)
    if not options.cluster:
        launch.profile = Profile(**json.loads((run.folder / "profile.json").read_text()))
        launch.wait = launch.profile.executor == "local" or options.wait
    run, missing = resubmit(launch, run)
    if not missing:
        return f"nothing to do: all of {run.folder.name} is done or under way"
    what = f"{len(missing)} of {run.total} shards" if run.elements else run.kind
    return f"submitted {what} again as {run.jobs[-1][0].partition('_')[0]}" if not launch.wait else f"{what} done"


COMMANDS = {
    "caption": array_command,
    "latents": array_command,
    "train": train_command,
    "convert": convert_command,
    "sample": sample_command,
    "demo": pipeline_command,
    "pipeline": pipeline_command,
    "retry": retry_command,
}
