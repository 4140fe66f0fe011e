"""List the runs of a home folder, newest first.

Shows when each run began, how long it took, its state, its dataset and the checkpoint that it started from. The state
of runs that may be active is queried; that of others is the one that was recorded last.
"""

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from jobs.commands.options import Command, CommonOptions, option, positive
from jobs.commands.tables import print_table
from jobs.progress import format_duration
from jobs.state import run as runs
from jobs.state.run import Element, Run
from jobs.state.run_metadata import FILE as METADATA_FILE
from jobs.state.run_metadata import read_description
from slurm.commands import SlurmUnavailableError

HEADER = ("run", "kind", "state", "begun", "duration", "dataset", "started from")
DEFAULT_NUMBER = 20


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """The options of `runs`."""

    number: int = option(
        "--number",
        metavar="N",
        default=DEFAULT_NUMBER,
        convert=positive,
        help=f"Number of runs to list (default: {DEFAULT_NUMBER}).",
    )
    kind: str | None = option("--kind", metavar="KIND", help="List only runs of this kind of job (default: all kinds).")


def run(options: Options) -> int:
    home = runs.home(options.home)
    folders = [
        folder for folder in reversed(runs.folders(home)) if options.kind is None or f"-{options.kind}-" in folder.name
    ]
    if not folders:
        of_kind = f" of the kind {options.kind!r}" if options.kind else ""
        raise ValueError(f"--home {home}: has no runs{of_kind}; run a job such as 'caption' first")
    shown = [runs.load(folder) for folder in folders[: options.number]]
    states = query_states([run for run in shown if may_be_active(run)])
    print_table(HEADER, [describe(run, home, states.get(run.folder)) for run in shown])
    if len(folders) > options.number:
        print(f"and {len(folders) - options.number} older runs; list them with --number {len(folders)}")
    return 0


def may_be_active(run: Run) -> bool:
    """Return whether the recorded status of a run says that its jobs may be active."""
    return (run.folder / METADATA_FILE).exists() and read_description(run.folder)["status"] == "RUNNING"


def describe(run: Run, home: Path, queried: tuple[bool, str] | None) -> tuple[str, ...]:
    """Return the cells of a run's row, in the order of HEADER; `queried` is by `query_states`, if called."""
    if not (run.folder / METADATA_FILE).exists():
        return (run.folder.name, run.kind, "unknown", "", "", shorten(run.dataset, home), "")
    metadata = read_description(run.folder)
    begun, status = metadata["begun"], metadata["status"]
    active, state = queried or (False, status.lower())
    end = time.time() if active else last_change(run)
    return (
        run.folder.name,
        run.kind,
        state,
        time.strftime("%Y-%m-%d %H:%M", time.localtime(begun)),
        format_duration(max(0.0, end - begun)),
        shorten(run.dataset, home),
        shorten(metadata["tags"].get("pixart.parent_checkpoint", ""), home),
    )


def query_states(requested: list[Run]) -> dict[Path, tuple[bool, str]]:
    """Return, by run folder, whether a run is active, and its state: of an array, the numbers of elements by state.

    Slurm is queried once for all runs.
    """
    try:
        return {
            run.folder: describe_elements(run, items)
            for run, items in zip(requested, runs.elements_of(requested), strict=True)
        }
    except SlurmUnavailableError:
        return dict.fromkeys((run.folder for run in requested), (True, "unknown: Slurm does not answer"))


def describe_elements(run: Run, elements: dict[int, Element]) -> tuple[bool, str]:
    """Return whether a run with these elements is active, and its state."""
    counts = Counter(element.state for element in elements.values())
    text = ", ".join(f"{count} {state}" for state, count in counts.items()) if run.elements else next(iter(counts), "")
    return runs.is_active(elements), text


def last_change(run: Run) -> float:
    """Return when the last task of a run ended, in seconds since the epoch: tasks write their results to `logs`."""
    logs = run.folder / "logs"
    return (logs if logs.exists() else run.folder).stat().st_mtime


def shorten(path: str, home: Path) -> str:
    """Return a path relative to the home folder if it lies there."""
    return str(Path(path).relative_to(home)) if path and Path(path).is_relative_to(home) else path


COMMAND = Command(Options, run)
