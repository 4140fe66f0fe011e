"""Submissions: a run folder with all that was asked for, and the jobs on the cluster."""

import functools
import getpass
import json
import os
import secrets
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from jobs.state import ledger
from jobs.state import run as runs
from jobs.state.run import Run
from jobs.state.run_metadata import FILE as DESCRIPTION
from jobs.state.run_metadata import add_tags, describe, set_status
from jobs.submission.code_snapshot import copy_code, record_git
from jobs.submission.launch import Launch, NothingSubmitted, tell
from jobs.submission.wait import follow
from jobs.tasks import audit, caption, convert, latents, recaption, sample, train, verify
from jobs.tracking.node_agent import accompanied, published
from pixart.config.recipe import to_json
from slurm.executor import Cluster, Shape, Submitted
from slurm.task import RESULT

ARRAY_JOBS = {"caption": caption.run, "latents": latents.run}
RANK_JOBS: dict[str, Callable[..., Any]] = {
    "audit": audit.run,
    "recaption": recaption.run,
    "verify": verify.run,
    "train": train.run,
    "convert": convert.run,
    "sample": sample.run,
}


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
