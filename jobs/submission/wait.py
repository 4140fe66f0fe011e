"""Wait for the end of a run, with a progress line."""

import re
import time
from collections.abc import Callable

from jobs.progress import ProgressLine
from jobs.state import run as runs
from jobs.state.run import Element, Run
from jobs.state.run_metadata import set_status
from jobs.submission.launch import JobFailedError, Launch, sync_run
from slurm import commands

POLL_SECONDS = {"local": 0.5, "slurm": 2.0}  # Slurm's controller serves many users
SYNC_SECONDS = 5.0
RETRY_SECONDS = 60.0  # between two attempts to reach an MLflow server that did not answer
RANK = re.compile(r"^\[rank\d+\]: ")  # prefix that torch writes before the lines of a rank


def wait_for_run(launch: Launch, run: Run, progress: Callable[[dict[int, Element]], tuple[int, str]]) -> None:
    """Wait for the end of a run with a progress line, and send its journal to MLflow.

    Raises ValueError for a failure that the user's input caused, JobFailedError for any other.
    """
    succeeded = False
    try:
        with ProgressLine(run.kind, run.total) as line:
            synced = time.monotonic()
            while runs.is_active(elements := runs.elements(run)):
                line.update(*progress(elements))
                time.sleep(POLL_SECONDS[run.executor])
                if time.monotonic() - synced > (RETRY_SECONDS if launch.mlflow_stale else SYNC_SECONDS):
                    sync_run(launch, run.folder)
                    synced = time.monotonic()
            line.update(*progress(elements))
            raise_first_failure(run, elements)
        succeeded = True
    except KeyboardInterrupt:
        commands.cancel(run.executor, run.job_ids)
        raise
    finally:
        set_status(run.folder, "FINISHED" if succeeded else "FAILED")
        sync_run(launch, run.folder)


def raise_first_failure(run: Run, elements: dict[int, Element]) -> None:
    """Raise the error of the first element that failed, if one did."""
    failed = {number: element for number, element in elements.items() if element.state == "failed"}
    for number, element in failed.items():
        name, _, message = RANK.sub("", element.note).partition(": ")
        if name == "ValueError":
            raise ValueError(message)
        subject = f"{run.kind} shard {number}" if run.elements else run.kind
        others = f", and {len(failed) - 1} more," if len(failed) > 1 else ""
        raise JobFailedError(f"{subject}{others} failed: {element.note}; its log is {run.log(element.job)}")


def dependencies(launch: Launch, run: Run) -> list[str]:
    """Return the ids of the jobs that the next job has to wait for: none if the launcher itself has waited."""
    return [] if launch.wait else run.job_ids
