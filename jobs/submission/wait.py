"""Wait for the end of a run, with a progress line."""

import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from jobs.progress import ProgressLine
from jobs.state import run as runs
from jobs.state.run import Element, Run
from jobs.state.run_metadata import Status, set_status
from jobs.submission.launch import JobFailedError, Launch, sync_run
from slurm import commands

LOCAL_POLL_SECONDS = 0.5
REFRESH_SECONDS = 2.0  # between updates of the progress line, which read files only
MAX_PAUSE_SECONDS = 300.0  # between queries of a controller that does not answer
SYNC_SECONDS = 5.0
RETRY_SECONDS = 60.0  # between two attempts to reach an MLflow server that did not answer
RANK = re.compile(r"^\[rank\d+\]: ")  # prefix that torch writes before the lines of a rank


def wait_for_run(launch: Launch, run: Run, progress: Callable[[dict[int, Element]], tuple[int, str]]) -> None:
    """Wait for the end of a run with a progress line, and send its journal to MLflow.

    An interrupt cancels processes of this machine; jobs of a cluster continue. Raises ValueError for a failure that the
    user's input caused, JobFailedError for any other.
    """
    with recorded_end(launch, run), ProgressLine(run.kind, run.total) as line:
        synced = time.monotonic()
        for elements in poll(run, launch.profile.poll_seconds):
            line.update(*progress(elements))
            if time.monotonic() - synced > (RETRY_SECONDS if launch.mlflow_stale else SYNC_SECONDS):
                sync_run(launch, run.folder)
                synced = time.monotonic()
        raise_first_failure(run, elements)


@contextmanager
def recorded_end(launch: Launch, run: Run) -> Iterator[None]:
    """Record how a run ended that the block waits for, and send the rest of its journal to MLflow.

    An interrupt cancels processes of this machine; jobs of a cluster continue, and the command that cancels them is
    printed.
    """
    status: Status = "FAILED"
    try:
        yield
        status = "FINISHED"
    except KeyboardInterrupt:
        if run.executor == "local":
            commands.cancel(run.executor, run.job_ids)
        else:
            status = "RUNNING"
            hint = f"python -m jobs.launch cancel {run.folder.name} --home {shlex.quote(str(launch.home))}"
            print(f"the jobs {', '.join(run.job_ids)} continue; cancel them with: {hint}", file=sys.stderr)
        raise
    finally:
        set_status(run.folder, status)
        sync_run(launch, run.folder)


def poll(run: Run, seconds: float) -> Iterator[dict[int, Element]]:
    """Yield the states of a run's elements until none is active.

    Slurm is queried every `seconds`, and at once when all data exists. While it does not answer, the pause doubles, and
    the states are those that were known last.
    """
    interval = LOCAL_POLL_SECONDS if run.executor == "local" else seconds
    pause, due, elements = interval, 0.0, {}
    while True:
        if time.monotonic() >= due or len(runs.done(run)) >= max(1, len(run.elements)):
            try:
                elements = runs.elements(run)
                pause = interval
            except commands.SlurmUnavailableError as error:
                if pause == interval:
                    print(f"{error}; the jobs are not affected, waiting for an answer", file=sys.stderr)
                pause = min(2 * pause, MAX_PAUSE_SECONDS)
            due = time.monotonic() + pause
        yield elements
        if elements and pause == interval and not runs.is_active(elements):
            return
        time.sleep(min(REFRESH_SECONDS, interval))


def raise_first_failure(run: Run, elements: dict[int, Element]) -> None:
    """Raise the error of the first element that failed, if one did."""
    failed = {number: element for number, element in elements.items() if element.state in runs.UNFINISHED}
    for number, element in failed.items():
        name, _, message = RANK.sub("", element.note).partition(": ")
        if name == "ValueError":
            raise ValueError(message)
        subject = f"{run.kind} shard {number}" if run.elements else run.kind
        others = f", and {len(failed) - 1} more," if len(failed) > 1 else ""
        if element.state == "cancelled":
            raise JobFailedError(f"{subject}{others} was cancelled; submit it again with 'retry'")
        raise JobFailedError(f"{subject}{others} failed: {element.note}; its log is {run.log(element.job)}")


def dependencies(launch: Launch, run: Run) -> list[str]:
    """Return the ids of the jobs that the next job has to wait for: none if the launcher itself has waited."""
    return [] if launch.wait else run.job_ids
