"""Submissions: a run folder with all that was asked for, the jobs on the cluster, and waiting for their end."""

import functools
import getpass
import json
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from jobs.progress import ProgressLine
from jobs.state import ledger
from jobs.state import run as runs
from jobs.state.run import Element, Run
from jobs.state.run_metadata import FILE as DESCRIPTION
from jobs.state.run_metadata import add_tags, describe, set_status
from jobs.submission.code_snapshot import copy_code, record_git
from jobs.tasks import audit, caption, convert, latents, recaption, sample, train, verify
from jobs.tracking.mlflow_store import Tracker
from jobs.tracking.node_agent import accompanied, published
from jobs.tracking.sync import try_publish
from pixart.config.recipe import Recipe, to_json
from slurm import commands
from slurm.executor import Cluster, Shape, Submitted
from slurm.profile import Profile
from slurm.task import RESULT

POLL_SECONDS = {"local": 0.5, "slurm": 2.0}  # Slurm's controller serves many
SYNC_SECONDS = 5.0
RANK = re.compile(r"^\[rank\d+\]: ")  # torch's, before a line of a process that is one of several
RETRY_SECONDS = 60.0  # of an MLflow server that did not answer
ARRAY_JOBS = {"caption": caption.run, "latents": latents.run}
RANK_JOBS: dict[str, Callable[..., Any]] = {
    "audit": audit.run,
    "recaption": recaption.run,
    "verify": verify.run,
    "train": train.run,
    "convert": convert.run,
    "sample": sample.run,
}


class JobFailedError(Exception):
    """A job ended without its result; the message names it and its log."""


class NothingSubmitted(Exception):  # noqa: N818 - no error
    """A dry run has come to its end; the message is what would have been submitted."""


@dataclass(kw_only=True)
class Launch:
    """What every submission of one command shares."""

    home: Path
    job: str  # the command's name
    recipe: Recipe
    profile: Profile
    submission: Path | None = None  # folder of what this command's runs belong to
    wait: bool = True
    dry_run: bool = False
    folders: list[Path] = field(default_factory=list)  # of all runs that it has begun
    untold: bool = False  # whether MLflow has not taken something

    @functools.cached_property
    def tracker(self) -> Tracker:
        return Tracker(self.home)

    @property
    def dataset(self) -> str:
        return self.recipe.data.path


def new_folder(home: Path, kind: str, place: str = "runs") -> Path:
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{kind}-{secrets.token_hex(2)}"
    folder = home / place / name
    folder.mkdir(parents=True)
    return folder


def begin(
    launch: Launch,
    shape: Shape,
    parameters: dict[str, Any],
    tags: dict[str, str] | None = None,
    folder: Path | None = None,
    after: Sequence[str] = (),
) -> Cluster:
    """Makes the run folder, with all that was asked for.

    Raises ValueError, with nothing made, for what the cluster would never run.
    """
    planned = planned_cluster(launch, after)
    planned.check(shape)
    if launch.dry_run:
        raise NothingSubmitted(planned.describe(shape) + "\n" + to_json(launch.recipe))
    continued = folder is not None and (folder / DESCRIPTION).exists()
    if launch.submission is None and not continued:
        launch.submission = new_folder(launch.home, launch.job, "submissions")
        write_settings(launch, launch.submission)
        describe(launch.submission, {"recipe": launch.recipe.name}, common_tags(launch, launch.job))
    folder = folder or new_folder(launch.home, shape.kind)
    write_settings(launch, folder)
    origin = {"pixart.dataset": launch.dataset, **commit_tags(record_git(folder))}
    describe(folder, parameters, {**(tags or {}), **origin, **common_tags(launch, shape.kind)}, launch.submission)
    launch.folders.append(folder)
    tell(launch, folder)
    return prepared(launch, folder, shape, after)


def planned_cluster(launch: Launch, after: Sequence[str] = ()) -> Cluster:
    """As a submission will have it, of a run that has no name yet."""
    run = launch.home / "runs" / "RUN"
    return Cluster(launch.profile, run, code=next_code(run), after=after)


def next_code(run: Path) -> Path:
    """Where the copy of the code for another submission of a run lies."""
    return run / f"code-{len(list(run.glob('code-*'))) + 1}"


def common_tags(launch: Launch, job: str) -> dict[str, str]:
    command = command_line()
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # within a container, perhaps
        user = f"user {os.getuid()}"
    own = {"pixart.job": job, "pixart.cluster": launch.profile.name, "pixart.user": user, "pixart.command": command}
    return {**own, "mlflow.user": user, "mlflow.source.name": command, "mlflow.source.type": "JOB"}


def command_line() -> str:
    """As it was given; Python itself has put the module's file in the place of `-m` and its name."""
    return shlex.join(["python", "-m", "jobs.launch", *sys.argv[1:]])


def commit_tags(commit: str | None) -> dict[str, str]:
    return {"pixart.commit": commit, "mlflow.source.git.commit": commit} if commit else {}


def tell(launch: Launch, folder: Path) -> None:
    """Where the launcher waits, MLflow has a run before its first task starts; else a process in the background sees
    to it."""
    if launch.wait:
        launch.untold = not try_publish(launch.tracker, folder)


def prepared(launch: Launch, folder: Path, shape: Shape, after: Sequence[str] = ()) -> Cluster:
    """The cluster, ready for a submission into a run folder: on Slurm, with a copy of the code."""
    if launch.profile.executor != "slurm":
        return Cluster(launch.profile, folder)
    code = next_code(folder)
    copy_code(code)
    cluster = Cluster(launch.profile, folder, code=code, after=after)
    (folder / "sbatch.txt").write_text(cluster.sbatch_text(shape))
    return cluster


def resubmit(launch: Launch, run: Run) -> tuple[Run, list[int]]:
    """Submits just what is neither done nor under way, into the same run; returns its elements too."""
    missing = [number for number, element in runs.elements(run).items() if element.state == "failed"]
    if not missing:
        return run, []
    planned = Cluster(launch.profile, run.folder, code=next_code(run.folder))
    if run.elements:
        shape = planned.array_shape(run.kind, missing)
    else:
        shape = planned.ranks_shape(run.kind, run.nodes, run.ranks_per_node)
    planned.check(shape)
    if launch.dry_run:
        raise NothingSubmitted(planned.describe(shape))
    cluster = prepared(launch, run.folder, shape)
    set_status(run.folder, "RUNNING")
    launch.folders.append(run.folder)
    return (submit_array if run.elements else submit_ranks)(launch, cluster, shape, run), missing


def write_settings(launch: Launch, folder: Path) -> None:
    (folder / "config.json").write_text(to_json(launch.recipe) + "\n")
    (folder / "command.txt").write_text(command_line() + "\n")
    (folder / "profile.json").write_text(json.dumps(asdict(launch.profile), indent=2) + "\n")


def follow(launch: Launch, run: Run, progress: Callable[[dict[int, Element]], tuple[int, str]]) -> None:
    """Waits for the run's end with a progress line and replays its journal.

    Raises ValueError for what the user can mend, JobFailedError for the rest.
    """
    succeeded = False
    try:
        with ProgressLine(run.kind, run.total) as line:
            synced = time.monotonic()
            while runs.under_way(found := runs.elements(run)):
                line.update(*progress(found))
                time.sleep(POLL_SECONDS[run.executor])
                if time.monotonic() - synced > (RETRY_SECONDS if launch.untold else SYNC_SECONDS):
                    tell(launch, run.folder)
                    synced = time.monotonic()
            line.update(*progress(found))
            raise_first_failure(run, found)
        succeeded = True
    except KeyboardInterrupt:
        commands.cancel(run.executor, run.job_ids)
        raise
    finally:
        set_status(run.folder, "FINISHED" if succeeded else "FAILED")
        tell(launch, run.folder)


def raise_first_failure(run: Run, found: dict[int, Element]) -> None:
    failed = {number: element for number, element in found.items() if element.state == "failed"}
    for number, element in failed.items():
        name, _, message = RANK.sub("", element.note).partition(": ")
        if name == "ValueError":
            raise ValueError(message)
        what = f"{run.kind} shard {number}" if run.elements else run.kind
        others = f", and {len(failed) - 1} more," if len(failed) > 1 else ""
        raise JobFailedError(f"{what}{others} failed: {element.note}; its log is {run.log(element.job)}")


def run_array(launch: Launch, kind: str, shards: Sequence[int], limit: int | None, after: Sequence[str] = ()) -> Run:
    """One task per shard, of those in `shards`."""
    launch.profile = replace(launch.profile, array_parallelism=limit or launch.profile.array_parallelism)
    shape = Cluster(launch.profile, launch.home).array_shape(kind, shards)
    parameters = {"dataset": launch.dataset, "shards": len(shards), "source": launch.recipe.data.source}
    cluster = begin(launch, shape, parameters, after=after)
    manifest = ledger.manifest(launch.dataset)
    assert manifest is not None  # `use_dataset` has made it
    ledger.forget_others(launch.dataset, kind, list(shards), manifest["hash"])
    run = new_run(launch, cluster, shape, total=len(shards))
    return submit_array(launch, cluster, shape, run)


def submit_array(launch: Launch, cluster: Cluster, shape: Shape, run: Run) -> Run:
    function = functools.partial(ARRAY_JOBS[run.kind], run.dataset)
    if run.executor == "slurm":
        function = functools.partial(published, function, str(run.folder))
    run = with_jobs(run, cluster.submit_array(shape, function))
    if launch.wait:
        follow(launch, run, lambda found: (sum(element.state == "done" for element in found.values()), ""))
    return run


def run_ranks(
    launch: Launch,
    shape: Shape,
    request: dict[str, Any],
    *,
    parameters: dict[str, Any],
    tags: dict[str, str],
    total: int,
    folder: Path | None = None,
    after: Sequence[str] = (),
) -> Run:
    """One job of one or more ranks; `request` are the arguments of its function but for the run folder."""
    cluster = begin(launch, shape, parameters, tags, folder, after)
    run = new_run(launch, cluster, shape, total=total, request=request)
    return submit_ranks(launch, cluster, shape, run)


def submit_ranks(launch: Launch, cluster: Cluster, shape: Shape, run: Run) -> Run:
    (run.folder / RESULT).unlink(missing_ok=True)
    function = functools.partial(accompanied, RANK_JOBS[run.kind], str(run.folder), **run.request)
    run = with_jobs(run, [cluster.submit_ranks(shape, function, cooperative=run.kind == "train")])
    if launch.wait:
        follow(launch, run, lambda found: runs.progress(run))
    return run


def with_jobs(run: Run, submitted: Sequence[Submitted]) -> Run:
    run = run.added(submitted)
    add_tags(run.folder, {"pixart.jobs": ", ".join(run.job_ids)})
    return run


def new_run(launch: Launch, cluster: Cluster, shape: Shape, total: int, request: dict[str, Any] | None = None) -> Run:
    before = runs.load(cluster.run).jobs if (cluster.run / runs.RECORD).exists() else ()
    return Run(
        folder=cluster.run,
        kind=shape.kind,
        executor=launch.profile.executor,
        dataset=launch.dataset,
        total=total,
        nodes=0 if shape.elements else shape.nodes,
        ranks_per_node=shape.ranks_per_node,
        elements=shape.elements,
        request=request or {},
        jobs=before,
    )


def describe_submission(run: Run) -> str:
    return (
        f"submitted {run.kind} as {', '.join(run.job_ids)}; run folder {run.folder}\n"
        f"next: python -m jobs.launch status {run.folder.name}"
    )


def waited(launch: Launch, run: Run) -> list[str]:
    """The jobs that what comes after a run has to wait for: none, where the launcher itself has waited."""
    return [] if launch.wait else run.job_ids
