"""Synchronization of runs: update the status, the shard metrics and the pages of a run, and send them to MLflow."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from jobs.reports.run_pages import write_pages
from jobs.state import ledger
from jobs.state import run as runs
from jobs.state.journal import Journal, parsed
from jobs.state.run import Element, Run
from jobs.state.run_metadata import read_description, set_status, status_of
from jobs.tracking import wandb_export
from jobs.tracking.mlflow_store import LOCK, LOG, StoreError, Tracker
from pixart.atomic import file_lock

BACKGROUND_LOCK = ".sync.lock"
SHARDS = "shards"  # name of the journal file with the metrics of the ledger's shards


def set_final_status(run: Run, elements: dict[int, Element]) -> None:
    """Set the final status of a run whose elements have all ended.

    The status is derived from the data and from Slurm, so that it is correct even if the launcher was killed.
    """
    if not runs.is_active(elements):
        set_status(run.folder, "FINISHED" if all(item.state == "done" for item in elements.values()) else "FAILED")


def journal_shards(run: Run) -> None:
    """Append the metrics of finished shards from the ledger to the journal, with the shard as the step.

    Tasks do not log them, since a killed task would lose them.
    """
    path = run.folder / "journal" / f"{SHARDS}.jsonl"
    recorded = {line["step"] for line in parsed(path.read_bytes())} if path.exists() else set()
    new = sorted((ledger.shards(run.dataset, run.kind) & set(run.elements)) - recorded)
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


def last_shard(run: Run) -> float | None:
    """Return when the last of a run's shards was finished, by its journal; None if no shard is there."""
    path = run.folder / "journal" / f"{SHARDS}.jsonl"
    return max((line["time"] for line in parsed(path.read_bytes())), default=None) if path.exists() else None


def sync_folder(tracker: Tracker, folder: Path) -> None:
    """Update a run folder and send it to MLflow.

    Raises StoreError if MLflow rejects it; the next call sends what is missing then.
    """
    if (folder / runs.RECORD).exists():  # the folder of a submission has no record
        update_folder(runs.load(folder))
    tracker.sync(folder)
    if read_description(folder).get("report") == wandb_export.NAME and status_of(folder) != "RUNNING":
        wandb_export.export(folder)


def update_folder(run: Run, *, pages: bool = False) -> None:
    """Add shard metrics and the status to a run folder, and the pages if the run has ended or `pages` is set."""
    with file_lock(run.folder / LOCK):
        if run.elements:
            journal_shards(run)
            if set(run.elements) <= ledger.shards(run.dataset, run.kind):
                set_status(run.folder, "FINISHED", last_shard(run))
        if pages or status_of(run.folder) != "RUNNING":
            write_pages(run)


def try_sync(tracker: Tracker, folder: Path) -> bool:
    """Synchronize a run and return whether it succeeded; errors go to the run's tracking log and fail no job."""
    try:
        sync_folder(tracker, folder)
    except StoreError as error:
        with (folder / LOG).open("a") as log:
            log.write(f"{error}\n")
        return False
    return True


def sync_in_background(home: Path, folders: Sequence[Path]) -> subprocess.Popen[bytes]:
    """Synchronize runs in a process that outlives this one, since importing MLflow takes longer than a submission."""
    with (folders[0] / LOG).open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.tracking.sync", str(home), *map(str, folders)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def main(home: str, *folders: str) -> int:
    """Synchronize folders, except those that another process synchronizes. Returns 0, or 1 if one failed."""
    tracker, succeeded = Tracker(home), True
    for folder in map(Path, folders):
        with file_lock(folder / BACKGROUND_LOCK, wait=False) as held:
            if held:
                succeeded = try_sync(tracker, folder) and succeeded
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
