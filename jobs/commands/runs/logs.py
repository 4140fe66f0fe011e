"""Print the logs of a run.

Prints the logs of every job, or of the job of one shard or of one rank; of each job, its errors come first. With
several logs, the name of its file precedes each part.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from jobs.commands.options import Command, RunOptions, option
from jobs.state import run as runs
from jobs.state.run import Run
from pixart.terminal import printable

FOLLOW_SECONDS = 0.5


def shard_number(text: str) -> int:
    """Return the number of a shard. Raises ValueError unless it is an integer of at least 0."""
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{text!r} is not the number of a shard")
    return int(text)


def rank_number(text: str) -> int:
    """Return the number of a rank. Raises ValueError unless it is an integer of at least 0."""
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{text!r} is not the number of a rank")
    return int(text)


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """The options of `logs`."""

    shard: int | None = option(
        "--shard", metavar="N", convert=shard_number, help="Print only the logs of this shard (default: every shard)."
    )
    rank: int | None = option(
        "--rank", metavar="N", convert=rank_number, help="Print only the logs of this rank (default: every rank)."
    )
    follow: bool = option(
        "-f", "--follow", default=False, help="Follow the logs until the jobs end (default: print them once)."
    )


def run(options: Options) -> int:
    shown = runs.find(runs.home(options.home), options.run)
    job_of = shown.job_of()
    if options.shard is not None and options.shard not in job_of:
        raise ValueError(f"--shard {options.shard}: {shown.folder.name} has no such shard")
    jobs = sorted(set(job_of.values())) if options.shard is None else [job_of[options.shard]]
    if options.rank is not None and options.rank >= max(1, shown.ranks):
        raise ValueError(f"--rank {options.rank}: {shown.folder.name} has the ranks 0 to {max(1, shown.ranks) - 1}")
    ends = print_new(find_logs(shown, jobs, options.rank), {})
    try:
        while options.follow and runs.is_active(runs.elements(shown)):
            time.sleep(FOLLOW_SECONDS)
            ends = print_new(find_logs(shown, jobs, options.rank), ends)
    except KeyboardInterrupt:
        return 130
    return 0


def find_logs(run: Run, jobs: list[str], rank: int | None = None) -> list[Path]:
    """Return the logs of the jobs that exist, of one rank or of all; of each job, standard error first."""
    logs = [log for job in jobs for stream in ("err", "out") for log in run.logs(job, stream)]
    return (
        logs if rank is None else [log for log in logs if log.name.endswith((f"_{rank}_log.err", f"_{rank}_log.out"))]
    )


def print_new(logs: list[Path], ends: dict[Path, int]) -> dict[Path, int]:
    """Print what each log has after its last printed byte, and return the new ends."""
    return {log: print_log(log, ends.get(log, 0), with_name=len(logs) > 1) for log in logs}


def print_log(log: Path, offset: int, *, with_name: bool) -> int:
    """Print a log from a byte offset on, and return the offset of its end."""
    with log.open("rb") as file:
        file.seek(offset)
        text = file.read()
    if text:
        if with_name:
            print(f"==> {log} <==")
        for line in text.decode(errors="replace").removesuffix("\n").split("\n"):
            print(printable(line.rstrip("\r").rpartition("\r")[2].expandtabs()))  # of a progress bar, its last state
        sys.stdout.flush()
    return offset + len(text)


COMMAND = Command(Options, run)
