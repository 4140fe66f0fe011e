"""Brings runs up to date: how they ended, what the ledger has of their shards, their pages, and all of it in MLflow."""

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

TURN = ".publishing"  # held by a process in the background
SHARDS = "shards"  # name of the journal's file that says what the ledger has


def settle(run: Run, found: dict[int, Element]) -> None:
    """Says how the run has ended, if it has: by its data and by Slurm, whatever became of the launcher."""
    if not runs.under_way(found):
        set_status(run.folder, "FINISHED" if all(item.state == "done" for item in found.values()) else "FAILED")


def journal_shards(run: Run) -> None:
    """Metrics of an array's elements, with the shard for a step, from the ledger: a killed task cannot lose them."""
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
    """Raises StoreError where MLflow does not take it; all is in the run folder then, for the next time."""
    if (folder / runs.RECORD).exists():  # no submission's own folder
        gather(runs.load(folder))
    tracker.sync(folder)


def gather(run: Run, *, pages: bool = False) -> None:
    """What the folder lacks of what is known elsewhere; pages once the run has ended, or when they are asked for."""
    with locked(run.folder):
        if run.elements:
            journal_shards(run)
            if set(run.elements) <= ledger.shards(run.dataset, run.kind):
                set_status(run.folder, "FINISHED")
        if pages or status_of(run.folder) != "RUNNING":
            write_pages(run)


def try_publish(tracker: Tracker, folder: Path) -> bool:
    """What keeps MLflow from taking it is written to the run's log: no job fails for that."""
    try:
        publish(tracker, folder)
    except StoreError as error:
        with (folder / LOG).open("a") as log:
            log.write(f"{error}\n")
        return False
    return True


def publish_in_background(home: Path, folders: Sequence[Path]) -> subprocess.Popen[bytes]:
    """By a process that outlives this one: importing MLflow takes longer than submitting."""
    with (folders[0] / LOG).open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.tracking.sync", str(home), *map(str, folders)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def main(home: str, *folders: str) -> int:
    """Leaves alone what another process is at."""
    tracker, done = Tracker(home), True
    for folder in map(Path, folders):
        with (folder / TURN).open("w") as turn:
            try:
                fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            except OSError:  # a file system without locks
                pass
            done = try_publish(tracker, folder) and done
    return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
