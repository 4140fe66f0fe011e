"""Submissions: a run folder with all that was asked for, the jobs on the cluster, and waiting for their end."""

import functools
import json
import secrets
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import submitit

from jobs import caption, init, latents, ledger
from jobs.progress import ProgressLine
from jobs.tracking import Tracker, read_journal, run_id
from pixart.config import DataConfig, Recipe, to_json
from slurm.cluster import Cluster
from slurm.profile import Profile

POLL_SECONDS = 0.5
SYNC_SECONDS = 5.0
CHANGEABLE = ("path", "caption_batch")  # settings of a dataset that its manifest does not fix
ARRAY_JOBS = {"caption": caption.run, "latents": latents.run}


class JobFailedError(Exception):
    """A job ended without its result; the message names it and its log."""


@dataclass(kw_only=True)
class Launch:
    """What every submission of one command shares."""

    home: Path
    recipe: Recipe
    profile: Profile
    parent: str | None = None  # MLflow run that this command's runs belong to
    wait: bool = True

    @functools.cached_property
    def tracker(self) -> Tracker:
        return Tracker(self.home)

    @property
    def dataset(self) -> str:
        return self.recipe.data.path


@dataclass(kw_only=True)
class Run:
    """A submission: its folder and its jobs."""

    kind: str
    folder: Path
    jobs: list[submitit.Job]

    def results(self) -> list[Any]:
        """Each job's result. Raises ValueError for what the user can mend, JobFailedError for the rest."""
        return [outcome for job in self.jobs for outcome in job_results(job)]


def job_results(job: submitit.Job) -> list[Any]:
    tasks = job._sub_jobs or [job]
    outcomes = []
    for task in tasks:
        try:
            status, value = task._get_outcome_and_result()
        except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
            raise JobFailedError(f"job {task.job_id} ended without a result; its log is {task.paths.stderr}") from error
        if status == "error":
            last = str(value).strip().splitlines()[-1]
            name, _, message = last.partition(": ")
            if name == "ValueError":
                raise ValueError(message)
            raise JobFailedError(f"job {task.job_id} failed with {last}; its log is {task.paths.stderr}")
        outcomes.append(value)
    return outcomes


def new_folder(home: Path, kind: str) -> Path:
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{kind}-{secrets.token_hex(2)}"
    folder = home / "runs" / name
    folder.mkdir(parents=True)
    return folder


def begin(
    launch: Launch,
    kind: str,
    parameters: dict[str, Any],
    tags: dict[str, str] | None = None,
    folder: Path | None = None,
) -> Path:
    """Makes the run folder and its MLflow run."""
    folder = folder or new_folder(launch.home, kind)
    (folder / "config.json").write_text(to_json(launch.recipe) + "\n")
    (folder / "command.txt").write_text(shlex.join(sys.argv) + "\n")
    (folder / "profile.json").write_text(json.dumps(asdict(launch.profile), indent=2) + "\n")
    if run_id(folder) is None:
        launch.tracker.start(folder, folder.name, parameters, {**(tags or {}), "pixart.job": kind}, launch.parent)
    return folder


def follow(launch: Launch, run: Run, total: int, progress: Callable[[], tuple[int, str]]) -> list[Any]:
    """Waits for the run's end with a progress line, replays its journal, and returns the results."""
    (run.folder / "jobs.json").write_text(json.dumps([job.job_id for job in run.jobs]) + "\n")
    if not launch.wait:
        return []
    succeeded = False
    try:
        with ProgressLine(run.kind, total) as line:
            synced = time.monotonic()
            while not all(job.done() for job in run.jobs):
                line.update(*progress())
                time.sleep(POLL_SECONDS)
                if time.monotonic() - synced > SYNC_SECONDS:
                    launch.tracker.sync(run.folder)
                    synced = time.monotonic()
            results = run.results()
            line.update(*progress())
        succeeded = True
        return results
    except KeyboardInterrupt:
        for job in run.jobs:
            job.cancel()
        raise
    finally:
        launch.tracker.finish(run.folder, succeeded)


def use_dataset(launch: Launch, assignments: Sequence[str]) -> dict[str, Any]:
    """The dataset's manifest, made now if it is not there; `launch.recipe` then says what it was made with.

    Raises ValueError where the recipe asks for another dataset than the one that is there.
    """
    manifest = ledger.manifest(launch.dataset)
    if manifest is None:
        make_dataset(launch)
        manifest = ledger.manifest(launch.dataset)
        assert manifest is not None
    made = DataConfig(**manifest["data"])
    named = {
        assignment.split("=")[0].removeprefix("data.") for assignment in assignments if assignment.startswith("data.")
    }
    for name in sorted(named.difference(CHANGEABLE)):
        if getattr(made, name) != getattr(launch.recipe.data, name):
            raise ValueError(
                f"data.{name}={getattr(launch.recipe.data, name)!r}: the dataset {launch.dataset} was made with "
                f"{getattr(made, name)!r}; name another by data.path"
            )
    changed = {name: getattr(launch.recipe.data, name) for name in CHANGEABLE}
    launch.recipe = replace(launch.recipe, data=replace(made, **changed))
    return manifest


def make_dataset(launch: Launch) -> None:
    """Runs the init job on this machine: it only looks at the source and writes one small file."""
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Profile(name="local", executor="local"), Path(folder))
        job = cluster.submit_ranks("init", 1, functools.partial(init.run, to_json(launch.recipe)))
        while not job.done():
            time.sleep(POLL_SECONDS / 5)
        job_results(job)


def run_array(launch: Launch, kind: str, shards: list[int], limit: int | None) -> Run:
    """One task per shard, of those in `shards`."""
    profile = replace(launch.profile, array_parallelism=limit) if limit else launch.profile
    parameters = {"dataset": launch.dataset, "shards": len(shards), "source": launch.recipe.data.source}
    folder = begin(launch, kind, parameters)
    cluster = Cluster(profile, folder / "logs")
    jobs = cluster.submit_array(kind, functools.partial(ARRAY_JOBS[kind], launch.dataset), shards)
    run = Run(kind=kind, folder=folder, jobs=jobs)
    done = set(ledger.entries(launch.dataset, kind, shards))

    def progress() -> tuple[int, str]:
        done.update(
            shard for shard in shards if shard not in done and ledger.path(launch.dataset, kind, shard).exists()
        )
        return len(done), ""

    follow(launch, run, len(shards), progress)
    return run


def run_ranks(
    launch: Launch,
    kind: str,
    function: Callable[[Path], Callable[[], Any]],
    *,
    parameters: dict[str, Any],
    tags: dict[str, str],
    total: int,
    nodes: int = 1,
    ranks_per_node: int | None = None,
    folder: Path | None = None,
) -> tuple[Run, Any]:
    """One job of one or more ranks; `function` is given the run folder. Returns rank 0's result too, if waited for."""
    folder = begin(launch, kind, parameters, tags, folder)
    cluster = Cluster(launch.profile, folder / "logs")
    job = cluster.submit_ranks(kind, nodes, function(folder), ranks_per_node)
    run = Run(kind=kind, folder=folder, jobs=[job])
    offset, step, note = 0, 0, ""

    def progress() -> tuple[int, str]:
        nonlocal offset, step, note
        lines, offset = read_journal(folder, offset)
        for line in lines:
            step = max(step, line.get("step", 0))
            if "train/loss" in line.get("metrics", {}):
                note = f"loss {line['metrics']['train/loss']:.4f}"
        return min(step, total), note

    results = follow(launch, run, total, progress)
    return run, results[0] if results else None
