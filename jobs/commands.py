"""What each command of the launcher does. Imports no torch: the jobs themselves do, where they run."""

import argparse
import functools
import json
import os
from pathlib import Path
from typing import Any

from jobs import convert, ledger, sample, train
from jobs.arrays import parse_array
from jobs.submission import Launch, begin, run_array, run_ranks, use_dataset
from jobs.tracking import run_id
from pixart.config import override, to_json
from pixart.recipes import RECIPES
from slurm import profile as profiles

MARKER = "training.json"  # of a checkpoint directory


def run(options: argparse.Namespace) -> int:
    """Runs the command that `options` names. Raises ValueError for what the user can mend, else JobFailedError."""
    launch = prepare(options)
    print(COMMANDS[options.job](launch, options))
    return 0


def prepare(options: argparse.Namespace) -> Launch:
    if options.recipe not in RECIPES:
        raise ValueError(f"unknown recipe {options.recipe!r}: it must be one of {', '.join(RECIPES)}")
    home = Path(options.home or os.environ.get("PIXART_HOME") or "outputs").absolute()
    recipe = override(RECIPES[options.recipe](str(home)), options.overrides)
    if options.dataset:
        recipe = override(recipe, [f"data.path={Path(options.dataset).absolute()}"])
    profile = profiles.load(options.cluster or profiles.default_name())
    wait = profile.executor == "local" or not getattr(options, "no_wait", False)
    return Launch(home=home, recipe=recipe, profile=profile, wait=wait)


def array_command(launch: Launch, options: argparse.Namespace) -> str:
    asked, limit = parse_array(options.array) if options.array is not None else (None, None)
    job = options.job
    manifest = use_dataset(launch, options.overrides)
    shards = check_shards(launch, manifest, asked)
    if job == "latents":
        require_captions(launch, shards)
    submitted = run_array(launch, job, shards, limit)
    if not launch.wait:
        return f"submitted {len(shards)} shards; run folder {submitted.folder}"
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


def prepare_dataset(launch: Launch, overrides: list[str]) -> dict[str, Any]:
    """Runs what is missing of the two data jobs, so that training on the embedded default needs no step before it."""
    manifest = use_dataset(launch, overrides)
    shards = check_shards(launch, manifest, None)
    for job in ("caption", "latents"):
        there = ledger.entries(launch.dataset, job, shards)
        missing = [shard for shard in shards if shard not in there]
        if missing and launch.recipe.data.source != "demo":
            raise ValueError(
                f"dataset {launch.dataset} is not whole: {job} lacks {len(missing)} of {len(shards)} shards"
            )
        if missing:
            print(
                f"{job} first: {len(missing)} of {len(shards)} shards of the demo's dataset are not there yet",
                flush=True,
            )
            run_array(launch, job, missing, None)
    return manifest


def train_command(launch: Launch, options: argparse.Namespace) -> str:
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
    manifest = prepare_dataset(launch, options.overrides)
    classes = len(manifest["class_names"])
    if stage == 1 and not start and classes >= launch.recipe.model.num_classes:
        raise ValueError(
            f"model.num_classes={launch.recipe.model.num_classes}: the dataset has {classes} classes, and one more "
            f"index means no class; give --set model.num_classes={classes + 1}"
        )
    last = submit_training(launch, stage, options.nodes, start=None if resumed else start, folder=resumed)
    if last is None:
        return "submitted"
    following = f"python -m conversion.to_fp8 {last}" if stage == 1 else f"python -m jobs.launch sample {last}"
    return f"trained stage {stage}: checkpoint {last}\nnext: {following}"


def submit_training(
    launch: Launch, stage: int, nodes: int, *, start: Path | None, folder: Path | None = None
) -> str | None:
    config = launch.recipe.train(stage)
    _, last = run_ranks(
        launch,
        "train",
        lambda run: functools.partial(
            train.run, to_json(launch.recipe), stage, str(run), str(start) if start else None
        ),
        parameters={
            "stage": stage,
            "nodes": nodes,
            "dataset": launch.dataset,
            **{name: getattr(config, name) for name in ("steps", "batch", "lr", "precision", "fp8", "ema", "drop")},
            **{name: getattr(launch.recipe.model, name) for name in ("dim", "num_blocks")},
        },
        tags={"pixart.parent_checkpoint": str(start)} if start else {},
        total=config.steps,
        nodes=nodes,
        folder=folder,
    )
    return last


def find_checkpoint(name: str) -> Path:
    """A checkpoint directory, or the newest of a run folder; looks at names, marker and the length of the weights."""
    path = Path(name).absolute()
    found = (
        [path]
        if (path / MARKER).exists()
        else sorted(item.parent for item in path.glob(f"checkpoints/step-*/{MARKER}"))
    )
    if not path.exists():
        raise ValueError(f"checkpoint {name}: no such file or directory")
    if not found:
        hint = "; a .pt file goes through `python -m conversion.to_fp8` first" if path.is_file() else ""
        raise ValueError(f"{name} is no checkpoint directory and no run with one{hint}")
    for file in sorted(found[-1].rglob("*.safetensors")):
        check_length(file)
    return found[-1]


def check_length(file: Path) -> None:
    """Raises ValueError unless a safetensors file is as long as its header says."""
    with file.open("rb") as stream:
        header_length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(header_length))
        except ValueError as error:
            raise ValueError(f"{file} is damaged or truncated") from error
    end = max((value["data_offsets"][1] for name, value in header.items() if name != "__metadata__"), default=0)
    if file.stat().st_size != 8 + header_length + end:
        raise ValueError(f"{file} is damaged or truncated")


def convert_command(launch: Launch, options: argparse.Namespace) -> str:
    source = Path(options.checkpoint).absolute()
    if not source.exists():
        raise ValueError(f"checkpoint {options.checkpoint}: no such file or directory")
    if source.is_dir():
        source = find_checkpoint(str(source))
    directory = submit_conversion(launch, source, options.output)
    return (
        f"converted: {directory}\nnext: python -m jobs.launch train --stage 2 --from {directory}"
        if directory
        else "submitted"
    )


def submit_conversion(launch: Launch, source: Path, output: str | None = None, **options: Any) -> str | None:
    target = (
        Path(output).absolute()
        if output
        else source.with_name(f"{source.stem if source.is_file() else source.name}.fp8")
    )
    _, directory = run_ranks(
        launch,
        "convert",
        lambda run: functools.partial(convert.run, str(source), str(target), str(run), options),
        parameters={"source": str(source)},
        tags={"pixart.parent_checkpoint": str(source)},
        total=1,
        ranks_per_node=1,
    )
    return directory


def sample_command(launch: Launch, options: argparse.Namespace) -> str:
    checkpoint = find_checkpoint(options.checkpoint)
    record = json.loads((checkpoint / MARKER).read_text())
    if not record["dataset"]:
        raise ValueError(f"{checkpoint} names no dataset, so its VAE and text encoder are not known: train it first")
    launch.recipe = override(launch.recipe, [f"data.path={record['dataset']}"])
    use_dataset(launch, [])
    result = submit_sampling(launch, checkpoint, options.prompt)
    return describe_samples(result) if result else "submitted"


def submit_sampling(launch: Launch, checkpoint: Path, prompts: list[str]) -> dict[str, Any] | None:
    _, result = run_ranks(
        launch,
        "sample",
        lambda run: functools.partial(sample.run, to_json(launch.recipe), str(checkpoint), str(run), prompts),
        parameters={"checkpoint": str(checkpoint), "guidance": launch.recipe.sample.guidance},
        tags={"pixart.parent_checkpoint": str(checkpoint)},
        total=1,
        ranks_per_node=1,
    )
    return result


def describe_samples(result: dict[str, Any]) -> str:
    lines = [f"sampled: {result['sheet']}"]
    if "color" in result:
        lines.append(
            f"counted: main colour right in {result['color']:.0%}, main shape in {result['shape']:.0%} "
            f"of {result['prompts']} prompts that training has not seen"
        )
    return "\n".join(lines)


def demo_command(launch: Launch, options: argparse.Namespace) -> str:
    """All jobs in turn, their runs under one parent in MLflow."""
    folder = begin(launch, "demo", {"recipe": launch.recipe.name})
    launch.parent = run_id(folder)
    succeeded = False
    try:
        prepare_dataset(launch, options.overrides)
        stage1 = submit_training(launch, 1, 1, start=None)
        converted = submit_conversion(launch, Path(str(stage1)), batch=launch.recipe.stage2.batch)
        stage2 = submit_training(launch, 2, 1, start=Path(str(converted)))
        result = submit_sampling(launch, Path(str(stage2)), [])
        succeeded = True
    finally:
        launch.tracker.finish(folder, succeeded)
    assert result is not None
    return f"{describe_samples(result)}\ncheckpoint: {stage2}\nruns: mlflow ui --backend-store-uri {launch.tracker.uri}"


COMMANDS = {
    "caption": array_command,
    "latents": array_command,
    "train": train_command,
    "convert": convert_command,
    "sample": sample_command,
    "demo": demo_command,
}
