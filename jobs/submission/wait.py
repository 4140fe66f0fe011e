"""Wait for a run's end, with a progress line."""

import re
import time
from collections.abc import Callable

from jobs.progress import ProgressLine
from jobs.state import run as runs
from jobs.state.run import Element, Run
from jobs.state.run_metadata import set_status
from jobs.submission.launch import JobFailedError, Launch, tell
from slurm import commands

POLL_SECONDS = {"local": 0.5, "slurm": 2.0}  # Slurm's controller serves many
SYNC_SECONDS = 5.0
RANK = re.compile(r"^\[rank\d+\]: ")  # torch's, before a line of a process that is one of several
RETRY_SECONDS = 60.0  # of an MLflow server that did not answer


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


def waited(launch: Launch, run: Run) -> list[str]:
    """The jobs that what comes after a run has to wait for: none, where the launcher itself has waited."""
    return [] if launch.wait else run.job_ids
