"""Show the state of a run: done, running, pending and failed elements.

The state comes from the data, and from Slurm if there is no data yet. Of a pipeline, every job is listed. Of a run on
Slurm that has ended, the requested and the used resources are shown. The exit code is 1 if an element failed.
"""

import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from jobs.commands.hints import next_command
from jobs.commands.options import Command, RunOptions, option
from jobs.commands.tables import print_table
from jobs.progress import format_rate
from jobs.reports import efficiency
from jobs.state import endpoint as endpoints
from jobs.state import ledger, nodes
from jobs.state import run as runs
from jobs.state.run import Element, Run
from jobs.state.run_metadata import FILE as METADATA_FILE
from jobs.state.run_metadata import read_description, read_profile
from jobs.submission.wait import LOCAL_POLL_SECONDS
from jobs.tracking.mlflow_store import needs_sync
from jobs.tracking.sync import set_final_status, sync_in_background
from pixart.terminal import printable
from slurm.commands import SlurmUnavailableError
from slurm.task import attempts

MAX_FAILURES = 10  # failed elements that are listed
MAX_NODES = 8  # that are listed with their attempts
STYLES = {
    "done": "green",
    "running": "cyan",
    "pending": "yellow",
    "unknown": "magenta",
    "cancelled": "red",
    "failed": "red",
}
NUM_QUERIES, FIRST_PAUSE_SECONDS = 4, 2.0  # of a controller that does not answer; each pause is twice the one before


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """The options of `status`."""

    watch: bool = option("--watch", default=False, help="Show the state again until the jobs end (default: once).")


def run(options: Options) -> int:
    home = runs.home(options.home)
    shown = runs.find(home, options.run)
    try:
        while True:
            submission = runs_of_submission(shown)
            elements, *of_submission = query([shown, *submission])
            print_status(options, shown, elements, list(zip(submission, of_submission, strict=True)))
            if not (options.watch and runs.is_active(elements)):
                break
            time.sleep(poll_seconds(shown))
            shown = runs.load(shown.folder)
    except KeyboardInterrupt:
        return 130
    if shown.writable and (shown.folder / METADATA_FILE).exists():
        set_final_status(shown, elements)
        if needs_sync(shown.folder):
            sync_in_background(home, [shown.folder])
    return 1 if any(element.state in runs.UNFINISHED for element in elements.values()) else 0


def poll_seconds(run: Run) -> float:
    """Return the pause between two queries, of the profile that a run was submitted with."""
    return LOCAL_POLL_SECONDS if run.executor == "local" else read_profile(run.folder).poll_seconds


def runs_of_submission(run: Run) -> list[Run]:
    """Return all runs of the same submission, such as a pipeline, in the order of the jobs; none if it has only one."""
    if not (run.folder / METADATA_FILE).exists() or not (parent := read_description(run.folder)["parent"]):
        return []
    folders = [Path(child) for child in read_description(Path(parent))["children"]]
    members = [runs.load(folder) for folder in folders if (folder / runs.RECORD).exists()]
    return members if len(members) > 1 else []


def query(requested: list[Run]) -> list[dict[int, Element]]:
    """Return the states of the elements of runs, after several queries if Slurm does not answer at first.

    Raises SlurmUnavailableError if it does not answer to the last query.
    """
    for number in range(NUM_QUERIES - 1):
        try:
            return runs.elements_of(requested)
        except SlurmUnavailableError as error:
            pause = FIRST_PAUSE_SECONDS * 2**number
            print(f"{error}; trying again in {pause:.0f} s", file=sys.stderr)
            time.sleep(pause)
    return runs.elements_of(requested)


def print_submission(submission: list[tuple[Run, dict[int, Element]]]) -> None:
    """Print the state of every run of a submission, in the order of the jobs."""
    if not submission:
        return
    print("all jobs of the submission, in order:")
    for other, elements in submission:
        counts = Counter(element.state for element in elements.values())
        state = ", ".join(f"{count} {name}" if other.elements else name for name, count in counts.items())
        print(f"  {other.kind:<8} {', '.join(other.job_ids):<12} {state:<24} {other.folder.name}")


def print_efficiency(run: Run, elements: dict[int, Element]) -> None:
    """Print what a run that has ended requested and used, with the lines of a profile that request what it needs."""
    if rows := efficiency.rows(run, elements, accounting=True):
        cells = [(row.resource, row.requested, row.used, row.suggested) for row in rows]
        print_table(("efficiency", "requested", "used", "suggested"), cells)


def print_status(
    options: RunOptions, run: Run, elements: dict[int, Element], submission: list[tuple[Run, dict[int, Element]]]
) -> None:
    """Print a table of the states, the progress of training, the first failures and the next command."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    restarts = max((line["restart"] for line in attempts(run.folder)), default=0)
    console.print(f"{run.kind}  {run.folder}", markup=False)
    console.print(f"jobs {', '.join(run.job_ids)}, restarts {restarts}", markup=False)
    for node, reason in nodes.excluded(run.folder).items():
        console.print(f"avoids node {node}: {printable(reason)}", markup=False)
    if len(starts := nodes.counts(run.folder)) > 1:
        listed = ", ".join(
            f"{node} {count}"
            for node, count in sorted(starts.items(), key=lambda item: (-item[1], item[0]))[:MAX_NODES]
        )
        console.print(f"attempts by node: {listed}{' and others' if len(starts) > MAX_NODES else ''}", markup=False)
    counts = Counter(element.state for element in elements.values())
    reasons = Counter(element.note for element in elements.values() if element.state == "pending")
    table = Table(box=None, pad_edge=False)
    table.add_column("state")
    table.add_column("shards" if run.elements else "runs", justify="right")
    table.add_column("note")
    notes = {
        "done": describe_rate(run, elements),
        "pending": ", ".join(f"{count} {reason}" if len(reasons) > 1 else reason for reason, count in reasons.items()),
        "unknown": ", ".join(sorted({element.note for element in elements.values() if element.state == "unknown"})),
    }
    for state, style in STYLES.items():
        if counts[state]:
            table.add_row(Text(state, style), str(counts[state]), Text(notes.get(state, "")))
    console.print(table)
    active = runs.is_active(elements)
    if run.kind == "train":
        console.print(describe_steps(run, active=active), markup=False)
    if run.kind == "serve" and active and (endpoint := endpoints.load(run.folder)):
        console.print(endpoints.describe(endpoint, is_remote=run.executor != "local"), markup=False)
    failed = [(number, element) for number, element in elements.items() if element.state in runs.UNFINISHED]
    for number, element in failed[:MAX_FAILURES]:
        subject = f"shard {number}" if run.elements else run.kind
        note = f": {printable(element.note)}" if element.note else ""
        console.print(f"{element.state}: {subject}, job {element.job or 'none'}{note}", markup=False)
    if len(failed) > MAX_FAILURES:
        console.print(f"and {len(failed) - MAX_FAILURES} more")
    print_submission(submission)
    if not active:
        print_efficiency(run, elements)
    following = "retry" if failed else "status" if active else "open"
    console.print(f"next: {next_command(options, following, run.folder.name)}", markup=False)


def describe_steps(run: Run, *, active: bool) -> str:
    """Return the step and loss of training and, while it runs, its rate and the remaining time at that rate."""
    step, note = runs.progress(run)
    parts = [f"step {step} of {run.total}", note]
    if active and (seconds := runs.seconds_per_step(run)):
        parts.append(f"{format_rate(1 / seconds)}, {(run.total - step) * seconds / 60:.1f} minutes left")
    return ", ".join(filter(None, parts))


def describe_rate(run: Run, elements: dict[int, Element]) -> str:
    """Return the shards per minute since the submission, and the remaining time at that rate."""
    if not run.elements:
        return ""
    submitted = (run.folder / "command.txt").stat().st_mtime
    moments = ledger.written(run.dataset, ledger.entries_of(run.kind))
    written = [moments[number] for number in elements if moments.get(number, 0.0) >= submitted]
    left = sum(element.state in runs.ACTIVE for element in elements.values())
    if not written:
        return ""
    rate = len(written) / max(1.0, max(written) - submitted)
    return f"{60 * rate:.1f} shards/min" + (f", {left / rate / 60:.1f} minutes left" if left else "")


COMMAND = Command(Options, run)
