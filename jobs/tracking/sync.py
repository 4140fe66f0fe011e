"""Synchronization of runs: update the status, the shard metrics and the pages of a run, and send them to MLflow."""

import fcntl
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.reports.run_pages import write_pages
from jobs.state import ledger
from jobs.state import run as runs
from jobs.state.journal import Journal, parsed
from jobs.state.run import Element, Run
from jobs.state.run_metadata import set_status, status_of
from jobs.tracking.mlflow_store import LOG, StoreError, Tracker, locked

TURN = ".publishing"  # lock of the background process
SHARDS = "shards"  # name of the journal file with the metrics of the ledger's shards


def settle(run: Run, found: dict[int, Element]) -> None:
    """Set the final status of a run whose elements have all ended.

    The status follows from the data and from Slurm, so that it is right even if the launcher was killed.
    """
    if not runs.under_way(found):
        set_status(run.folder, "FINISHED" if all(item.state == "done" for item in found.values()) else "FAILED")


def journal_shards(run: Run) -> None:
    """Append the metrics of finished shards from the ledger to the journal, with the shard as the step.

    Tasks do not log them, since a killed task would lose them.
    """
    path = run.folder / "journal" / f"{SHARDS}.jsonl"
    told = {line["step"] for line in parsed(path.read_bytes())} if path.exists() else set()
    new = sorted((ledger.shards(run.dataset, run.kind) & set(run.elements)) - told)
    journal = Journal(run.folder, SHARDS)
    for shard, entry in ledger.entries(run.dataset, run.kind, new).items():
        values = {
            "data/images": entry.rows,
            "data/num_valid": entry.valid,
            "data/seconds": entry.seconds,
            "data/images_per_second": entry.rows / max(entry.seconds, 1e-3),
        }
        written = ledger.path(run.dataset, run.kind, shard).stat().st_mtime
        journal.append({"time": written, "step": shard, "metrics": values})


def publish(tracker: Tracker, folder: Path) -> None:
    """Update a run folder and send it to MLflow.

    Raises StoreError if MLflow rejects it; the next call sends what is missing then.
    """
    if (folder / runs.RECORD).exists():  # the folder of a submission has no record
        gather(runs.load(folder))
    tracker.sync(folder)


def gather(run: Run, *, pages: bool = False) -> None:
    """Add shard metrics and the status to a run folder, and the pages if the run has ended or `pages` is set."""
    with locked(run.folder):
        if run.elements:
            journal_shards(run)
            if set(run.elements) <= ledger.shards(run.dataset, run.kind):
                set_status(run.folder, "FINISHED")
        if pages or status_of(run.folder) != "RUNNING":
            write_pages(run)


def try_publish(tracker: Tracker, folder: Path) -> bool:
    """Publish a run and return whether it succeeded; an error goes to the run's tracking log, and fails no job."""
    try:
        publish(tracker, folder)
    except StoreError as error:
        with (folder / LOG).open("a") as log:
            log.write(f"{error}\n")
        return False
    return True


def publish_in_background(home: Path, folders: Sequence[Path]) -> subprocess.Popen[bytes]:
    """Publish runs from a process that outlives this one, since importing MLflow takes longer than a submission."""
    with (folders[0] / LOG).open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.tracking.sync", str(home), *map(str, folders)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def main(home: str, *folders: str) -> int:
    """Publish the folders, except those that another process is publishing. Returns 0, or 1 if one failed."""
    tracker, done = Tracker(home), True
    for folder in map(Path, folders):
        with (folder / TURN).open("w") as turn:
            try:
                fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            except OSError:  # the file system has no locks
                pass
            done = try_publish(tracker, folder) and done
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
