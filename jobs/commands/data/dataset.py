"""Functions that the dataset commands share: opening a dataset, selecting shards, and running the data jobs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs.commands.hints import next_command
from jobs.commands.options import RecipeOptions, SubmissionOptions, option, positive
from jobs.state import ledger
from jobs.state.run import Run
from jobs.submission.datasets import open_dataset
from jobs.submission.launch import Launch
from jobs.submission.submit import run_array, run_ranks
from jobs.submission.wait import dependencies
from jobs.tasks import audit
from pixart.config.dataset import is_url
from pixart.terminal import printable
from slurm.executor import Cluster


@dataclass(frozen=True, kw_only=True)
class DatasetOptions(RecipeOptions, SubmissionOptions):
    """The options of a command that works on one dataset."""


@dataclass(frozen=True, kw_only=True)
class ArrayOptions(DatasetOptions):
    """The options of a command that submits one task per shard."""

    TITLE = "shards"

    array: str | None = option(
        "--array",
        metavar="SHARDS",
        help="Shards as 0-255, 3,7,9-12 or 0-999:10, and after % how many run at once (default: all shards).",
    )
    per_task: int | None = option(
        "--per-task",
        metavar="N",
        convert=positive,
        help="Number of shards that one task of the array processes (default: 1, or more for small shards).",
    )


def open_writable_dataset(
    launch: Launch,
    *,
    create: bool = False,
    create_by: Callable[[], None] | None = None,
    shards: list[int] | None = None,
    describe: bool = True,
) -> dict[str, Any]:
    """Return the manifest of a dataset on a file system; with `create`, create one that does not exist.

    `create_by` creates it (default: the init job does). What a new one takes from its source is printed unless
    `describe` is false. Raises ValueError for a URL,
    for a dataset that does not exist, and for one that would not have all `shards`.
    """
    if is_url(launch.dataset):
        raise ValueError(
            f"{launch.command}: the dataset {launch.dataset} is a URL; create it on a file system, and copy it there"
        )
    is_new = ledger.manifest(launch.dataset) is None and not launch.dry_run
    if is_new:
        if not create:
            raise ValueError(f"dataset {launch.dataset} does not exist; run 'caption' to create it")
        select_shards(launch, launch.recipe.data.num_shards, shards)
    manifest = open_dataset(launch, create_by)
    if is_new and describe:
        print(describe_contents(launch.dataset, manifest), end="", flush=True)
    return manifest


def describe_contents(dataset: str, manifest: dict[str, Any]) -> str:
    """Describe what was taken from the source and left out, one line each; an empty text for the demo's scenes."""
    contents = ledger.contents(dataset)
    if contents is None or manifest["data"]["source"] == "demo":
        return ""
    labelled, largest = contents["labelled"], contents["largest_label"]
    labels = f"{labelled} with labels up to {largest}" if labelled else "none with a label"
    words = "with words" if contents["has_words"] else "none with words"
    lines = [f"source: {contents['items']} items, {labels}, {len(manifest['class_names'])} class names, {words}"]
    if columns := [f"{role} from {', '.join(names)}" for role, names in contents["columns"].items() if names]:
        lines.append(f"columns: {'; '.join(columns)}")
    if left_out := [f"{count} {reason}" for reason, count in contents["left_out"].items()]:
        lines.append(f"left out: {', '.join(left_out)}")
    if manifest["data"]["captioner"] == "labels" and not contents["has_words"]:
        lines.append(
            "warning: no item has words; set data.captioner=vllm, or name the captions by data.columns.caption"
        )
    return "".join(f"{printable(line)}\n" for line in lines)


def refuse_adopted(launch: Launch, manifest: dict[str, Any]) -> None:
    """Raise ValueError for an adopted dataset, whose images the command would need."""
    if ledger.is_adopted(manifest):
        raise ValueError(
            f"{launch.command}: the dataset {launch.dataset} was adopted from {manifest['data']['source']} with its "
            "captions and latents, and has no images; run 'adopt' for shards that are missing"
        )


def select_shards(launch: Launch, count: int, shards: list[int] | None = None) -> list[int]:
    """Return `shards`, in ascending order, or all shards. Raises ValueError for one beyond the dataset's `count`."""
    if shards is None:
        return list(range(count))
    if shards[-1] >= count:
        raise ValueError(
            f"--array: shard {shards[-1]} does not exist; the dataset {launch.dataset} has shards 0 to {count - 1}"
        )
    return shards


def describe_shards(
    launch: Launch, options: ArrayOptions, job: str, shards: list[int], *, folder: str, following: str
) -> str:
    """Return what a finished data job reports, and the command that follows it."""
    entries = ledger.entries(launch.dataset, job, shards)
    rows, valid = sum(entry.rows for entry in entries.values()), sum(entry.valid for entry in entries.values())
    return (
        f"{job}: {len(shards)} shards, {valid} of {rows} images valid, in {launch.dataset}/{folder}\n"
        f"next: {next_command(options, following)}"
    )


def submit_dataset_job(launch: Launch, kind: str, after: list[str] | None = None) -> Run:
    """Submit one process that reads the whole dataset."""
    return run_ranks(
        launch,
        Cluster(launch.profile, launch.home).ranks_shape(kind, 1, 1),
        {},
        parameters={"dataset": launch.dataset},
        tags={},
        total=1,
        after=after or [],
    )


def prepare_dataset(launch: Launch, manifest: dict[str, Any], *, any_source: bool = False) -> list[str]:
    """Run what is missing of the two data jobs, and return the ids of the jobs to wait for.

    Only the demo's dataset is completed before training, unless `any_source`; for another one that is incomplete
    it raises ValueError.
    """
    shards = select_shards(launch, manifest["data"]["num_shards"])
    after: list[str] = []
    for job in ("caption", "latents"):
        missing = ledger.missing_shards(launch.dataset, job, manifest) if "hash" in manifest else shards
        is_refused = ledger.is_adopted(manifest) or not (any_source or launch.recipe.data.source == "demo")
        if missing and is_refused:
            raise ValueError(ledger.incomplete(launch.dataset, job, len(missing), manifest))
        if missing:
            print(f"running {job} first: {len(missing)} of {len(shards)} shards are missing", flush=True)
        if missing and not launch.dry_run:
            after = dependencies(launch, run_array(launch, job, missing, None, after))
    return after


def require_audit(launch: Launch, after: list[str], *, any_source: bool = False) -> list[str]:
    """Audit a dataset that was just completed, or the demo's, and return the ids of the jobs to wait for.

    Raises ValueError for another dataset that has not passed its audit.
    """
    if launch.dry_run:
        return after
    if not after:
        try:
            audit.require(launch.dataset)
            return []
        except ValueError:
            if not any_source and launch.recipe.data.source != "demo":
                raise
    print("running audit first: the dataset in its current state has no audit", flush=True)
    return dependencies(launch, submit_dataset_job(launch, "audit", after))
