"""After submitting: how a run stands, its logs, ending it, and doing again what is missing."""

import argparse
import time
from collections import Counter
from pathlib import Path

from jobs.progress import spoken
from jobs.state import ledger
from jobs.state import run as runs
from jobs.state.run import Element, Run
from jobs.state.run_metadata import FILE as DESCRIPTION
from jobs.tracking.mlflow_store import Tracker, behind
from jobs.tracking.sync import publish, publish_in_background, settle
from slurm import commands
from slurm.task import attempts

SHOWN = 10  # failures in a table
FOLLOW_SECONDS = 0.5
STYLES = {"done": "green", "running": "cyan", "pending": "yellow", "failed": "red"}


def status_command(home: Path, options: argparse.Namespace) -> int:
    """Prints a table; the exit code is 1 where something has failed."""
    run = runs.find(home, options.run)
    found = runs.elements(run)
    print_table(run, found)
    if run.writable and (run.folder / DESCRIPTION).exists():
        settle(run, found)
        if behind(run.folder):
            publish_in_background(home, [run.folder])
    return 1 if any(element.state == "failed" for element in found.values()) else 0


def print_table(run: Run, found: dict[int, Element]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    restarts = max((line["restart"] for line in attempts(run.folder)), default=0)
    console.print(f"{run.kind}  {run.folder}", markup=False)
    console.print(f"jobs {', '.join(run.job_ids)}, restarts {restarts}", markup=False)
    counts = Counter(element.state for element in found.values())
    reasons = Counter(element.note for element in found.values() if element.state == "pending")
    table = Table(box=None, pad_edge=False)
    for name in ("state", "shards" if run.elements else "runs", "note"):
        table.add_column(name, justify="right" if name in ("shards", "runs") else "left")
    notes = {
        "done": describe_rate(run, found),
        "pending": ", ".join(f"{count} {reason}" if len(reasons) > 1 else reason for reason, count in reasons.items()),
    }
    for state, style in STYLES.items():
        if counts[state]:
            table.add_row(Text(state, style), str(counts[state]), Text(notes.get(state, "")))
    console.print(table)
    if run.kind == "train":
        console.print(describe_steps(run, under_way=runs.under_way(found)), markup=False)
    failed = [(number, element) for number, element in found.items() if element.state == "failed"]
    for number, element in failed[:SHOWN]:
        what = f"shard {number}" if run.elements else run.kind
        console.print(f"failed: {what}, job {element.job}: {element.note}", markup=False)
    if len(failed) > SHOWN:
        console.print(f"and {len(failed) - SHOWN} more")
    following = "retry" if failed else "status" if runs.under_way(found) else "open"
    console.print(f"next: python -m jobs.launch {following} {run.folder.name}", markup=False)


def describe_steps(run: Run, *, under_way: bool) -> str:
    """How far training is and, while it goes on, how fast, and the time that the rest takes at that rate."""
    step, note = runs.progress(run)
    parts = [f"step {step} of {run.total}", note]
    if under_way and (seconds := runs.seconds_per_step(run)):
        parts.append(f"{spoken(1 / seconds)}, {(run.total - step) * seconds / 60:.1f} minutes left")
    return ", ".join(filter(None, parts))


def describe_rate(run: Run, found: dict[int, Element]) -> str:
    """Shards of this run by the minute, and the time that the rest takes at that rate."""
    if not run.elements:
        return ""
    begun = (run.folder / "command.txt").stat().st_mtime
    paths = [ledger.path(run.dataset, run.kind, number) for number, item in found.items() if item.state == "done"]
    written = [moment for path in paths if (moment := path.stat().st_mtime) >= begun]
    left = sum(element.state in ("pending", "running") for element in found.values())
    if not written:
        return ""
    rate = len(written) / max(1.0, max(written) - begun)
    return f"{60 * rate:.1f} a minute" + (f", {left / rate / 60:.1f} minutes left" if left else "")


def logs_command(home: Path, options: argparse.Namespace) -> int:
    """Prints what the run's tasks have said, of one shard or of all; with `-f`, as it is written."""
    run = runs.find(home, options.run)
    job_of = run.job_of()
    if options.shard is not None and options.shard not in job_of:
        raise ValueError(f"--shard {options.shard}: {run.folder.name} has no such shard")
    wanted = sorted(set(job_of.values())) if options.shard is None else [job_of[options.shard]]
    logs = [log for job in wanted for stream in ("out", "err") for log in run.logs(job, stream)]
    ends = {log: show(log, 0, named=len(logs) > 1) for log in logs}
    while options.follow and runs.under_way(runs.elements(run)):
        time.sleep(FOLLOW_SECONDS)
        logs = [log for job in wanted for stream in ("out", "err") for log in run.logs(job, stream)]
        ends = {log: show(log, ends.get(log, 0), named=len(logs) > 1) for log in logs}
    return 0


def show(log: Path, offset: int, *, named: bool) -> int:
    """Prints a log from a byte on and returns its end."""
    with log.open("rb") as file:
        file.seek(offset)
        text = file.read()
    if text:
        if named:
            print(f"==> {log} <==")
        print(text.decode(errors="replace"), end="" if text.endswith(b"\n") else "\n", flush=True)
    return offset + len(text)


def cancel_command(home: Path, options: argparse.Namespace) -> int:
    run = runs.find(home, options.run)
    active = {element.job for element in runs.elements(run).values() if element.state in ("pending", "running")}
    commands.cancel(run.executor, sorted({job.partition("_")[0] for job in active}))
    print(f"cancelled {len(active)} jobs of {run.folder}\nnext: python -m jobs.launch retry {run.folder.name}")
    return 0


def sync_command(home: Path, options: argparse.Namespace) -> int:
    """Replays into MLflow what it lacks, of one run or of all, and says there how they have ended."""
    folders = [runs.find(home, options.run).folder] if options.run else runs.folders(home)
    if not folders:
        raise ValueError(f"there are no runs in {home}")
    tracker, told = Tracker(home), 0
    for folder in folders:
        run = runs.load(folder)
        settle(run, runs.elements(run))
        if options.run or behind(folder):
            publish(tracker, folder)
            told += 1
    print(f"synchronized {told} of {len(folders)} runs with {tracker.uri}; the others were up to date")
    return 0


COMMANDS = {"status": status_command, "logs": logs_command, "cancel": cancel_command, "sync": sync_command}
