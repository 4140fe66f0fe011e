"""Submit jobs: create the run folder with its records, and the jobs on the cluster."""

import functools
import getpass
import json
import math
import os
import secrets
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from jobs.state import ledger, nodes
from jobs.state import run as runs
from jobs.state.run import Run
from jobs.state.run_metadata import FILE as METADATA_FILE
from jobs.state.run_metadata import add_tags, change, describe, set_status
from jobs.submission import estimates
from jobs.submission.code_snapshot import copy_code, record_git
from jobs.submission.launch import Launch, NothingSubmitted, sync_run
from jobs.submission.wait import wait_for_run
from jobs.tasks import adopt, audit, caption, convert, latents, recaption, sample, serve, train, verify
from jobs.tasks.evaluation import evaluate, judge, summarize
from jobs.tracking.node_agent import with_node_agent, with_sync
from pixart.config.recipe import to_json
from pixart.relocation import record_location
from slurm.commands import SlurmError, SlurmUnavailableError
from slurm.executor import Cluster, Submitted
from slurm.sbatch import Shape, predicted_start
from slurm.task import RESULT

# Images that occupy a task for longer than its start takes: a task imports torch and loads its models in about 10 s.
IMAGES_PER_TASK = 1024
ARRAY_JOBS: dict[str, Callable[[str, list[int]], None]] = {
    "adopt": adopt.run,
    "caption": caption.run,
    "latents": latents.run,
    "evaluate": evaluate.run,
    "judge": judge.run,
}
RANK_JOBS: dict[str, Callable[..., Any]] = {
    "audit": audit.run,
    "recaption": recaption.run,
    "verify": verify.run,
    "train": train.run,
    "convert": convert.run,
    "sample": sample.run,
    "summarize": summarize.run,
    "serve": serve.run,
}
COOPERATIVE = ("train", "serve")  # kinds of jobs that end by themselves after a signal


def new_folder(home: Path, kind: str, parent: str = "runs") -> Path:
    """Create a folder whose name has the time, the kind of job and four random digits."""
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{kind}-{secrets.token_hex(2)}"
    folder = home / parent / name
    folder.mkdir(parents=True)
    record_location(home)
    return folder


def start_run(
    launch: Launch,
    shape: Shape,
    parameters: dict[str, Any],
    tags: dict[str, str] | None = None,
    folder: Path | None = None,
    after: Sequence[str] = (),
) -> Cluster:
    """Create the run folder with its records, and return the cluster to submit to.

    Raises ValueError, with nothing written, for a shape that the cluster cannot run; NothingSubmitted in a dry run.
    """
    planned = planned_cluster(launch, after)
    planned.check(shape)
    if launch.dry_run:
        expected = forecast(planned, launch, shape, parameters.get("stage"))
        raise NothingSubmitted(f"{planned.describe(shape)}\n{to_json(launch.recipe)}\n{expected}")
    continued = folder is not None and (folder / METADATA_FILE).exists()
    if launch.submission is None and not continued:
        launch.submission = new_folder(launch.home, launch.command, "submissions")
        write_settings(launch, launch.submission)
        describe(launch.submission, {"recipe": launch.recipe.name}, common_tags(launch, launch.command))
    folder = folder or new_folder(launch.home, shape.kind)
    write_settings(launch, folder)
    origin = {"pixart.dataset": launch.dataset, **commit_tags(record_git(folder))}
    describe(folder, parameters, {**(tags or {}), **origin, **common_tags(launch, shape.kind)}, launch.submission)
    if launch.report:
        change(folder, report=launch.report)
    launch.folders.append(folder)
    sync_run(launch, folder)
    return make_cluster(launch, folder, shape, after)


def forecast(cluster: Cluster, launch: Launch, shape: Shape, stage: int | None = None) -> str:
    """Describe when a submission would start, the GPU hours that it asks for, and what it writes.

    Raises SlurmError if Slurm would refuse it.
    """
    hours = estimates.requested_gpu_hours(launch.profile, shape)
    limit = "without a time limit" if hours is None else f"{hours:.1f} at most"
    lines = [f"GPU hours: {limit}", f"writes: {estimates.written(launch.recipe, shape, stage)}"]
    if cluster.is_slurm:
        try:
            lines.insert(0, f"start: {predicted_start(cluster.sbatch_text(shape))}")
        except SlurmUnavailableError as error:
            lines.insert(0, f"start: unknown ({error})")
    return "\n".join(f"# {shape.kind} {line}" for line in lines)


def planned_cluster(launch: Launch, after: Sequence[str] = ()) -> Cluster:
    """Return the cluster for a run folder that does not exist yet, to check and describe a submission."""
    run = launch.home / "runs" / "RUN"
    return Cluster(launch.profile, run, code=next_code(run), after=after)


def next_code(run: Path) -> Path:
    """Return the folder for the code of the next submission of a run."""
    return run / f"code-{len(list(run.glob('code-*'))) + 1}"


def common_tags(launch: Launch, job: str) -> dict[str, str]:
    """Return the MLflow tags that every run and submission has."""
    command = command_line()
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may lack the user's entry
        user = f"user {os.getuid()}"
    tags = {"pixart.job": job, "pixart.cluster": launch.profile.name, "pixart.user": user, "pixart.command": command}
    return {**tags, "mlflow.user": user, "mlflow.source.name": command, "mlflow.source.type": "JOB"}


def command_line() -> str:
    """Return the command line as the user typed it; in sys.argv, Python replaces `-m MODULE` by the module's file."""
    return shlex.join(["python", "-m", "jobs.launch", *sys.argv[1:]])


def commit_tags(commit: str | None) -> dict[str, str]:
    """Return the tags that name the commit; none outside of a repository."""
    return {"pixart.commit": commit, "mlflow.source.git.commit": commit} if commit else {}


def make_cluster(launch: Launch, folder: Path, shape: Shape, after: Sequence[str] = ()) -> Cluster:
    """Return the cluster for a run folder; on Slurm, copy the code there and write the sbatch text."""
    if launch.profile.executor != "slurm":
        return Cluster(launch.profile, folder)
    code = next_code(folder)
    copy_code(code)
    cluster = Cluster(launch.profile, folder, code=code, after=after)
    (folder / "sbatch.txt").write_text(cluster.sbatch_text(shape))
    return cluster


def resubmit(launch: Launch, run: Run) -> tuple[Run, list[int]]:
    """Submit the failed elements of a run again, in the same run folder; return the run and these elements."""
    elements = runs.elements(run)
    missing = [number for number, element in elements.items() if element.state in runs.UNFINISHED]
    if not missing:
        return run, []
    avoided = nodes.suspects(run, elements)
    for node, reason in avoided.items():
        print(f"avoiding node {node}: {reason}", file=sys.stderr)
    exclude = nodes.joined(launch.profile.exclude, ",".join(avoided))
    launch.profile = replace(launch.profile, exclude=exclude)
    after = active_dependencies(launch.home, run)
    planned = Cluster(launch.profile, run.folder, code=next_code(run.folder), after=after)
    if run.elements:
        shape = planned.array_shape(run.kind, missing, run.per_task)
    else:
        shape = planned.ranks_shape(run.kind, run.nodes, run.ranks_per_node)
    planned.check(shape)
    if launch.dry_run:
        raise NothingSubmitted(planned.describe(shape))
    cluster = make_cluster(launch, run.folder, shape, after)
    run = replace(run, after=tuple(after))
    set_status(run.folder, "RUNNING")
    launch.folders.append(run.folder)
    return (submit_array if run.elements else submit_ranks)(launch, cluster, shape, run), missing


def active_dependencies(home: Path, run: Run) -> list[str]:
    """Return the ids of the jobs that a run waits for and that are active.

    Raises ValueError if one of the runs that it needs has ended without success: the run would use incomplete data.
    """
    needed = [other for other in map(runs.load, runs.folders(home)) if set(other.job_ids) & set(run.after)]
    active: list[str] = []
    for other in needed:
        elements = runs.elements(other)
        if unfinished := [number for number, element in elements.items() if element.state in runs.UNFINISHED]:
            count = f"{len(unfinished)} of {len(elements)} shards are" if other.elements else "it is"
            raise ValueError(
                f"{run.folder.name} needs {other.folder.name}, and {count} not done; run "
                f"'python -m jobs.launch retry {other.folder.name}' first"
            )
        waiting = [element.job for element in elements.values() if element.state in runs.ACTIVE]
        active += sorted({job.partition("_")[0] for job in waiting})
    return active


def write_settings(launch: Launch, folder: Path) -> None:
    """Write the recipe, the command line and the cluster profile to a folder."""
    (folder / "config.json").write_text(to_json(launch.recipe) + "\n")
    (folder / "command.txt").write_text(command_line() + "\n")
    (folder / "profile.json").write_text(json.dumps(asdict(launch.profile), indent=2) + "\n")


def run_array(launch: Launch, kind: str, shards: Sequence[int], limit: int | None, after: Sequence[str] = ()) -> Run:
    """Submit one task for each of `shards`, at most `limit` at once."""
    launch.profile = replace(launch.profile, array_parallelism=limit or launch.profile.array_parallelism)
    shape = array_shape(launch, kind, shards)
    parameters = {"dataset": launch.dataset, "shards": len(shards), "source": launch.recipe.data.source}
    cluster = start_run(launch, shape, parameters, after=after)
    manifest = ledger.manifest(launch.dataset)
    assert manifest is not None  # open_dataset has created it
    ledger.drop_stale_entries(launch.dataset, kind, list(shards), manifest["hash"])
    run = new_run(launch, cluster, shape, total=len(shards))
    return submit_array(launch, cluster, shape, run)


def run_elements(
    launch: Launch,
    kind: str,
    folder: Path,
    elements: Sequence[int],
    *,
    request: dict[str, Any],
    prepare: Callable[[], None],
    after: Sequence[str] = (),
) -> Run:
    """Submit one task for each of `elements` of the evaluation in `folder`, whose ledger says which are done.

    `prepare` writes what the tasks read; a dry run does not call it.
    """
    shape = Cluster(launch.profile, launch.home).array_shape(kind, elements)
    parameters = {"evaluation": folder.name, "shards": len(elements)}
    tags = {"pixart.evaluation": str(folder)}
    cluster = start_run(launch, shape, parameters, tags, after=after)
    prepare()
    run = replace(new_run(launch, cluster, shape, total=len(elements), request=request), dataset=str(folder))
    return submit_array(launch, cluster, shape, run)


def array_shape(launch: Launch, kind: str, shards: Sequence[int]) -> Shape:
    """Return the shape of an array over `shards`, of which small ones share a task unless the user has set a number.

    Raises ValueError if the user has set it for this machine, whose processes share all shards.
    """
    cluster = Cluster(launch.profile, launch.home)
    if not cluster.is_slurm:
        if launch.per_task:
            raise ValueError(
                f"--per-task {launch.per_task}: the profile {launch.profile.name} has no array tasks, and its "
                "processes share the shards; leave it out"
            )
        return cluster.array_shape(kind, shards)
    return cluster.array_shape(kind, shards, launch.per_task or shards_per_task(launch, len(shards)))


def shards_per_task(launch: Launch, count: int) -> int:
    """Return how many of `count` shards share a task: those of IMAGES_PER_TASK images, while all nodes are occupied."""
    manifest = ledger.manifest(launch.dataset)
    if manifest is None:  # a dry run before the dataset exists
        data = launch.recipe.data
        rows = (data.max_images or IMAGES_PER_TASK * data.num_shards) // data.num_shards
    else:
        rows = manifest["rows_per_shard"]
    per_node = math.ceil(count / (launch.profile.array_parallelism or 1))
    return max(1, min(IMAGES_PER_TASK // max(1, rows), per_node))


def submit_array(launch: Launch, cluster: Cluster, shape: Shape, run: Run) -> Run:
    """Submit the array, and wait for its end if the launch waits."""
    function = functools.partial(ARRAY_JOBS[run.kind], run.dataset)
    if run.executor == "slurm":
        function = functools.partial(with_sync, function, str(run.folder))
    submitted = 0
    try:
        for part in cluster.submit_array(shape, function):
            run = add_jobs(run, part)
            submitted += sum(len(item.elements) for item in part)
    except SlurmError as error:
        set_status(run.folder, "RUNNING" if submitted else "FAILED")
        if not submitted:
            raise
        raise SlurmError(
            f"{error}; {submitted} of {len(shape.elements)} shards were submitted before, and continue; submit the "
            f"others with 'python -m jobs.launch retry {run.folder.name}'"
        ) from error
    if launch.wait:
        wait_for_run(launch, run, lambda elements: (sum(item.state == "done" for item in elements.values()), ""))
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
    """Submit one job of one or more ranks; `request` holds its function's arguments after the run folder."""
    cluster = start_run(launch, shape, parameters, tags, folder, after)
    run = new_run(launch, cluster, shape, total=total, request=request)
    return submit_ranks(launch, cluster, shape, run)


def submit_ranks(launch: Launch, cluster: Cluster, shape: Shape, run: Run) -> Run:
    """Submit the job of ranks, and wait for its end if the launch waits."""
    (run.folder / RESULT).unlink(missing_ok=True)
    function = functools.partial(with_node_agent, RANK_JOBS[run.kind], str(run.folder), **run.request)
    try:
        run = add_jobs(run, [cluster.submit_ranks(shape, function, cooperative=run.kind in COOPERATIVE)])
    except SlurmError:
        set_status(run.folder, "FAILED")
        raise
    if launch.wait:
        wait_for_run(launch, run, lambda elements: runs.progress(run))
    return run


def add_jobs(run: Run, submitted: Sequence[Submitted]) -> Run:
    """Add submitted jobs to the records of a run."""
    run = run.added(submitted)
    add_tags(run.folder, {"pixart.jobs": ", ".join(run.job_ids)})
    return run


def new_run(launch: Launch, cluster: Cluster, shape: Shape, total: int, request: dict[str, Any] | None = None) -> Run:
    """Return the record of a run; one that is resumed keeps its earlier jobs."""
    jobs = runs.load(cluster.run).jobs if (cluster.run / runs.RECORD).exists() else ()
    return Run(
        folder=cluster.run,
        kind=shape.kind,
        executor=launch.profile.executor,
        dataset=launch.dataset,
        total=total,
        nodes=0 if shape.elements else shape.nodes,
        ranks_per_node=shape.ranks_per_node,
        elements=shape.elements,
        per_task=shape.per_task,
        request=request or {},
        jobs=jobs,
        after=tuple(cluster.after),
    )
