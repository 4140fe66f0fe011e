"""The command that samples: what is asked for is checked against checkpoint and dataset before anything is written."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.commands.recaption import rewritten_by_server, submit_recaption, tell_problems
from jobs.state import ledger
from jobs.state import run as runs
from jobs.state.checkpoint_names import INFERENCE, find_weights
from jobs.state.prompts import read_prompts
from jobs.state.run import Run
from jobs.submission.datasets import use_dataset
from jobs.submission.launch import Launch
from jobs.submission.submit import describe_submission, run_ranks
from jobs.submission.wait import waited
from pixart.config import overrides
from slurm.executor import Cluster

NO_CLASS = "none"
SHOWN = 8  # class names in an error


def sample_command(launch: Launch, options: argparse.Namespace) -> str:
    checkpoint, record = find_weights(options.checkpoint)
    in_fp8 = (checkpoint / INFERENCE).exists()
    check_options(options, checkpoint, record["stage"], in_fp8)
    manifest = own_dataset(launch, options, checkpoint, record)
    model = json.loads((checkpoint / "config.json").read_text()) if in_fp8 else record["config"]
    check_fits(model, manifest, launch.dataset)
    classes = [class_index(name, manifest["class_names"], model["num_classes"]) for name in options.classes]
    prompts = [{"prompt": text} for text in options.prompt] + (read_prompts(options.file) if options.file else [])
    if options.recaption and not prompts:
        raise ValueError("--recaption rewrites prompts: give --prompt or --file")

    rewritten, after = None, list[str]()
    if options.recaption and not launch.dry_run:
        requests = [each["prompt"] for each in prompts]
        if options.server:
            found = rewritten_by_server(requests, options)
            tell_problems(found)
            prompts = [{"prompt": each["text"], "request": each["request"]} for each in found]
        else:
            job = submit_recaption(launch, requests, options.model)
            rewritten, after = job.folder / "rewritten.jsonl", waited(launch, job)
            if launch.wait:
                tell_problems(runs.result(job))
    run = submit_sampling(
        launch,
        checkpoint,
        prompts=prompts,
        classes=classes,
        per_prompt=options.per_prompt,
        weights=options.weights,
        rewritten=rewritten,
        export=Path(options.export).absolute() if options.export else None,
        after=after,
    )
    if not launch.wait:
        return describe_submission(run)
    return f"{describe_samples(runs.result(run))}\nnext: python -m jobs.launch lineage {run.folder.name}"


def check_options(options: argparse.Namespace, checkpoint: Path, stage: int, in_fp8: bool) -> None:
    """Raises ValueError for options that do not go together, or not with the checkpoint."""
    words = "--prompt" if options.prompt else "--file" if options.file else "--recaption" if options.recaption else ""
    if stage == 1 and words:
        raise ValueError(f"{checkpoint} is of stage 1, which reads classes: give --class, not {words}")
    if stage == 2 and options.classes:
        raise ValueError(f"{checkpoint} is of stage 2, which reads text: give --prompt, not --class")
    for name in ("server", "model"):
        if getattr(options, name) and not options.recaption:
            raise ValueError(f"--{name} is of --recaption: give both, or neither")
    if in_fp8 and options.weights != "ema":
        raise ValueError(f"--weights {options.weights}: {checkpoint} holds the average alone")
    if in_fp8 and options.export:
        raise ValueError(f"--export: {checkpoint} is in FP8, which diffusers has no scales for; name the checkpoint")
    if options.export and Path(options.export).exists():
        raise ValueError(f"--export {options.export}: is there already, name another folder")
    if options.export and any(parent.is_file() for parent in Path(options.export).absolute().parents):
        raise ValueError(f"--export {options.export}: lies below a file")


def own_dataset(
    launch: Launch, options: argparse.Namespace, checkpoint: Path, record: dict[str, Any]
) -> dict[str, Any]:
    """The manifest of the dataset that was trained on, or that is named; it says which VAE and text encoder."""
    named = options.dataset or any(item.startswith("data.path=") for item in options.overrides)
    if not named and not record["dataset"]:
        raise ValueError(f"{checkpoint} names no dataset, so its VAE and text encoder are not known: give --dataset")
    if not named:
        launch.recipe = overrides.apply(launch.recipe, [f"data.path={record['dataset']}"])
    if ledger.manifest(launch.dataset) is None:
        raise ValueError(f"dataset {launch.dataset}: there is none; give --dataset where it lies now")
    return use_dataset(launch, options.overrides)


def check_fits(model: dict[str, Any], manifest: dict[str, Any], dataset: str) -> None:
    """Raises ValueError for a dataset of another VAE's or another text encoder's sizes."""
    channels = manifest["latent_shape"][0]
    if model["in_dim"] != channels:
        raise ValueError(f"the model makes {model['in_dim']} latent channels, the VAE of {dataset} has {channels}")
    if model.get("text_dim") not in (None, manifest["text_dim"]):
        raise ValueError(
            f"the model reads text states of width {model['text_dim']}, those of {dataset} are "
            f"{manifest['text_dim']} wide"
        )


def class_index(asked: str, names: Sequence[str], num_classes: int) -> int:
    """The label of a class by its name, its index or `none`. Raises ValueError for one that is not there."""
    if asked in names:
        return list(names).index(asked)
    if asked == NO_CLASS:
        return num_classes - 1
    last = (len(names) or num_classes - 1) - 1
    if asked.isdecimal() and int(asked) <= last:
        return int(asked)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    told = f", by name {', '.join(names[:SHOWN])}{more}" if names else ""
    raise ValueError(f"--class {asked}: the classes are 0 to {last}{told}, and {NO_CLASS}")


def submit_sampling(
    launch: Launch,
    checkpoint: Path,
    *,
    prompts: Sequence[dict[str, str]] = (),
    classes: Sequence[int] = (),
    per_prompt: int = 1,
    weights: str = "ema",
    rewritten: Path | None = None,
    export: Path | None = None,
    after: Sequence[str] = (),
) -> Run:
    options = launch.recipe.sample
    return run_ranks(
        launch,
        Cluster(launch.profile, launch.home).ranks_shape("sample", 1, 1),
        {
            "checkpoint": str(checkpoint),
            "prompts": [] if rewritten else list(prompts),
            "classes": list(classes),
            "per_prompt": per_prompt,
            "weights": weights,
            "rewritten": str(rewritten) if rewritten else None,
            "export": str(export) if export else None,
        },
        parameters={
            "checkpoint": str(checkpoint),
            "weights": weights,
            **{name: getattr(options, name) for name in ("steps", "guidance", "seed")},
        },
        tags={"pixart.parent_checkpoint": str(checkpoint)},
        total=(len(prompts) or len(classes) or options.count) * per_prompt,
        after=after,
    )


def describe_samples(result: dict[str, Any]) -> str:
    lines = [f"sampled: {result['sheet']}"] if "sheet" in result else []
    if "color" in result:
        lines.append(
            f"counted: main colour right in {result['color']:.0%}, main shape in {result['shape']:.0%} "
            f"of {result['prompts']} prompts that training has not seen"
        )
    if result["export"]:
        lines.append(f"exported: {result['export']}")
    return "\n".join(lines)
