"""Resources that jobs have used: recorded by each rank at its end, and by sacct if there is accounting.

A rank that was killed leaves no record; sacct measures no memory on clusters without a plugin that gathers it.
"""

import json
import re
import resource
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypedDict

import msgspec

from slurm.commands import NO_ACCOUNTING, RUNNING_STATES, SlurmError, command

FILE = "usage.jsonl"  # in the run folder, one line for each end of each rank
COLUMNS = ("JobID", "State", "ElapsedRaw", "NNodes", "NTasks", "TotalCPU", "MaxRSS", "TRESUsageInAve", "TRESUsageInMax")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a job, or a task of an array, has used in its longest attempt; None for what was not measured."""

    seconds: float
    processors: float | None  # in use per task, as a mean over time
    memory_bytes: float | None  # peak on a node
    gpu_percent: float | None = None  # mean utilization
    gpu_memory_bytes: float | None = None  # peak of a task


class Meter:
    """Measures this process, from its creation on, and its children that have ended; of memory, the larger of both."""

    def __init__(self) -> None:
        self.begun = time.monotonic()

    def record(self, run: Path, **identity: Any) -> None:
        """Append a line with what was used, and with `identity`: job, restart, node and rank."""
        process, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        line = {
            **identity,
            "seconds": time.monotonic() - self.begun,
            "processor_seconds": sum(item.ru_utime + item.ru_stime for item in (process, children)),
            # Not the sum: the peak of a child begins with that of its parent, from which it was forked.
            "memory_bytes": 1024 * max(process.ru_maxrss, children.ru_maxrss),
        }
        with suppress(OSError), (run / FILE).open("a") as file:  # a full disk fails no task that has written its data
            file.write(json.dumps(line) + "\n")


class Line(TypedDict):
    """What one rank has used from its start to its end."""

    job: str
    rank: int
    restart: int
    node: str
    seconds: float
    processor_seconds: float
    memory_bytes: float


def read_lines(path: Path, schema: Any) -> list[Any]:
    """Return the records in the lines of a file; lines damaged by a network file system are skipped."""
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return []
    records = []
    for line in lines:
        with suppress(ValueError, RecursionError, msgspec.ValidationError):
            records.append(msgspec.convert(json.loads(line), schema))
    return records


def recorded(run: Path) -> dict[str, Usage]:
    """Return what the ranks of a run have recorded, by job id."""
    attempts: dict[tuple[str, int], list[Line]] = {}
    for line in read_lines(run / FILE, Line):
        attempts.setdefault((line["job"], line["restart"]), []).append(line)
    usages: dict[str, Usage] = {}
    for (job, _), lines in attempts.items():
        by_node: dict[str, float] = {}
        for line in lines:
            by_node[line["node"]] = by_node.get(line["node"], 0) + line["memory_bytes"]
        usage = Usage(
            seconds=max(line["seconds"] for line in lines),
            processors=fmean(line["processor_seconds"] / max(line["seconds"], 0.1) for line in lines),
            memory_bytes=max(by_node.values()),
        )
        if job not in usages or usage.seconds > usages[job].seconds:
            usages[job] = usage
    return usages


def accounted(jobs: Sequence[str]) -> dict[str, Usage]:
    """Return what sacct knows about ended jobs, by job id; nothing without accounting.

    Raises SlurmUnavailableError if the database does not answer, SlurmError if sacct fails.
    """
    array_ids = sorted({job.partition("_")[0] for job in jobs})
    try:
        listing = command(
            "sacct", "--noheader", "--parsable2", f"--format={','.join(COLUMNS)}", f"--jobs={','.join(array_ids)}"
        )
    except SlurmError as error:
        if NO_ACCOUNTING.search(str(error)):
            return {}
        raise
    wanted = set(jobs)
    return {job: usage for job, usage in parse(listing.splitlines()).items() if job in wanted}


def parse(lines: Iterable[str]) -> dict[str, Usage]:
    """Return what sacct's lines say about jobs that have run and ended, by job id.

    The line of an allocation, such as `12_3`, has its duration and its processor time; those of its steps, such as
    `12_3.0`, have the memory of the largest task, of which a node has as many as the step has per node.
    """
    usages: dict[str, Usage] = {}
    tasks: dict[str, int] = {}
    processor_seconds: dict[str, float] = {}
    for line in lines:
        cells = line.split("|")
        if len(cells) != len(COLUMNS):
            continue
        row = dict(zip(COLUMNS, cells, strict=True))
        job, _, step = row["JobID"].partition(".")
        if not step:
            if row["State"].split(" ")[0] not in RUNNING_STATES and int(row["ElapsedRaw"] or 0) > 0:
                usages[job] = Usage(seconds=float(row["ElapsedRaw"]), processors=None, memory_bytes=None)
                processor_seconds[job] = parse_clock(row["TotalCPU"])
            continue
        if job not in usages:
            continue
        count = int(row["NTasks"] or 1)
        tasks[job] = max(count, tasks.get(job, 1))
        of_node = -(-count // int(row["NNodes"] or 1))
        usages[job] = replace(
            usages[job],
            memory_bytes=largest(usages[job].memory_bytes, of_node, parse_size(row["MaxRSS"])),
            gpu_percent=largest(usages[job].gpu_percent, 1, tracked(row["TRESUsageInAve"], "gpuutil")),
            gpu_memory_bytes=largest(usages[job].gpu_memory_bytes, 1, tracked(row["TRESUsageInMax"], "gpumem")),
        )
    for job, seconds in processor_seconds.items():
        if seconds:  # sacct writes 0 if no plugin gathers it
            used = seconds / usages[job].seconds / tasks.get(job, 1)
            usages[job] = replace(usages[job], processors=used)
    return usages


def largest(known: float | None, factor: int, value: float | None) -> float | None:
    """Return the larger of a known value and of `factor` times another one; None is no value."""
    return known if value is None else max(known or 0.0, factor * value)


def tracked(text: str, name: str) -> float | None:
    """Return the value of `gres/NAME` in a list such as `cpu=00:01:02,gres/gpuutil=40,mem=11M`."""
    match = re.search(rf"\bgres/{name}=([^,]+)", text)
    return parse_size(match[1]) if match else None


def parse_size(text: str) -> float | None:
    """Return a number such as `1.5G` or `300K`, in units without prefix; None for any other text, and for zero."""
    match = re.fullmatch(r"([0-9.]+)([KMGT]?)n?", text)
    return float(match[1]) * UNITS[match[2]] or None if match else None


def parse_clock(text: str) -> float:
    """Return the seconds of `[days-][hours:]minutes:seconds[.thousandths]`; 0 for an empty text."""
    days, _, clock = text.rpartition("-")
    seconds = 0.0
    for part in filter(None, clock.split(":")):
        seconds = 60 * seconds + float(part)
    return 86_400 * int(days or 0) + seconds
