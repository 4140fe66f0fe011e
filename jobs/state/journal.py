"""The journal of a run: metrics, artifacts, tags and incidents as lines of JSON, appended by tasks.

Each process appends to a separate file in RUN/journal, since on a network file system two nodes that append to one file
overwrite each other. A line is one write, so that a killed process leaves complete lines and at most one truncated line
at the end. This module imports nothing heavy, because a training step waits for it.
"""

import functools
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, TypedDict

from pixart import records
from pixart.relocation import home_of, portable


class Line(TypedDict, total=False):
    """A line of the journal: metrics of a step, or one other event."""

    time: records.Moment
    step: records.Count
    metrics: dict[str, float]
    artifact: str
    tags: dict[str, str]
    incident: str


FOLDER = "journal"
TAIL_BYTES = 1 << 20  # per file; the FP8 metrics of all linears are one line
EXTREMES: dict[str, Callable[..., float]] = {"min": min, "max": max}
CRITICAL = {"headroom": "min", "saturation_rate": "max"}  # only this extreme is kept; of other metrics, both
# Metrics of runs of version 0.1: pattern, current name, factor of the unit.
EARLIER_NAMES = (
    (r"fp8/overflow_share/(.*)", r"fp8/saturation_rate/\1", 1.0),
    (r"train/data_wait", "train/data_loading_fraction", 1.0),
    (r"data/valid", "data/num_valid", 1.0),
    (r"system/load_node(\d+)", r"system/node_\1/load_average_1m", 1.0),
    (r"system/memory_gb_node(\d+)", r"system/node_\1/max_memory_allocated_gib", 1e9 / 2**30),
    (r"system/cpu_percent_node(\d+)", r"system/node_\1/cpu_utilization_percentage", 1.0),
    (r"system/ram_gb_node(\d+)", r"system/node_\1/system_memory_usage_megabytes", 1e3),
    (r"system/disk_free_gb_node(\d+)", r"system/node_\1/disk_available_megabytes", 1e3),
    (r"system/gpu_percent_node(\d+)", r"system/node_\1/gpu_utilization_percentage", 1.0),
    (r"system/gpu_memory_gb_node(\d+)", r"system/node_\1/gpu_memory_usage_megabytes", 1e3),
    (r"system/gpu_watts_node(\d+)", r"system/node_\1/gpu_power_usage_watts", 1.0),
)
Ends = dict[str, int]  # by file name, the offset of the byte after the last line read


class Journal:
    """Writer of one process's journal file in the run folder `run`.

    The file is created with the first line; its name sorts by the time of creation. Processes that never write at the
    same time can share a file by giving its `name`.
    """

    def __init__(self, run: str | Path, name: str | None = None) -> None:
        self.folder, self.name = Path(run) / FOLDER, name
        self.file: FileIO | None = None

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Append the metrics of a step."""
        self.append({"step": step, "metrics": {key: float(value) for key, value in values.items()}})

    def artifact(self, file: str | Path) -> None:
        """Append a file to log to MLflow; `previews/step-00000400.png` becomes the image of that step."""
        self.append({"artifact": portable(str(file), home_of(self.folder))})

    def tags(self, values: Mapping[str, str]) -> None:
        """Append tags of the MLflow run."""
        self.append({"tags": dict(values)})

    def incident(self, step: int, text: str) -> None:
        """Append an event that explains the curves: a skipped step, a fallback or a loss spike."""
        self.append({"incident": text, "step": step})

    def append(self, line: Mapping[str, Any]) -> None:
        """Append one line; its `time`, in seconds since the epoch, is now unless `line` has one."""
        if self.file is None:
            self.file = self.open()
        self.file.write((json.dumps({"time": time.time(), **line}) + "\n").encode())

    def open(self) -> FileIO:
        """Open the file to append to, and terminate the line that a killed process left incomplete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        name = self.name or f"{time.time_ns()}-{socket.gethostname()}-{os.getpid()}"
        file = (self.folder / f"{name}.jsonl").open("ab+", buffering=0)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # keep a truncated line separate from the next one
                file.write(b"\n")
        return file


def files(run: str | Path) -> list[Path]:
    """Return the journal files of a run, oldest first."""
    return sorted((Path(run) / FOLDER).glob("*.jsonl"))


def read_journal(
    run: str | Path, begin: Mapping[str, int] | None = None, end: Mapping[str, int] | None = None
) -> tuple[list[dict[str, Any]], Ends]:
    """Return the complete lines between two offsets, and the offsets at which the next read begins.

    `begin` and `end` hold byte offsets by file name. A truncated line at the end of a file is left out.
    """
    lines: list[dict[str, Any]] = []
    ends: Ends = {}
    for path in files(run):
        first = (begin or {}).get(path.name, 0)
        length = -1 if end is None else end.get(path.name, 0) - first
        with path.open("rb") as file:
            file.seek(first)
            content = file.read(length)
        complete = content[: content.rfind(b"\n") + 1]
        lines += parsed(complete)
        ends[path.name] = first + len(complete)
    return lines, ends


def read_tail(run: str | Path) -> list[dict[str, Any]]:
    """Return the lines in the last TAIL_BYTES of every file: enough for a run's status, however long the run is."""
    lines: list[dict[str, Any]] = []
    for path in files(run):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines += parsed(file.read())
    return lines


def parsed(content: bytes) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of the lines; lines that cannot be parsed are skipped."""
    for line in content.splitlines():
        with suppress(ValueError):
            yield records.parse(line, Line, "journal")  # the end of a line cut at its beginning may parse as a number


def points(lines: list[dict[str, Any]], seen: set[tuple[str, int]]) -> Iterator[tuple[str, float, float, int]]:
    """Yield key, value, time in seconds and step of every metric, only once for a step that was repeated.

    `seen` holds the pairs of key and step yielded before; new ones are added to it.
    """
    for line in lines:
        for key, value in summarized(line.get("metrics", {})).items():
            if (key, line["step"]) not in seen:
                seen.add((key, line["step"]))
                yield key, value, line["time"], line["step"]


def summarized(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return metrics under their current names, and of `fp8/METRIC/LINEAR.SLOT` the extremes over all linears.

    A large model has thousands of FP8 metrics, too many for a tracking server.
    """
    summary: dict[str, float] = {}
    for name, recorded in metrics.items():
        key, factor = current_name(name)
        value = factor * recorded
        if not key.startswith("fp8/"):
            summary[key] = value
            continue
        metric, slot = key.split("/")[1], key.rpartition(".")[2]
        for suffix, extreme in EXTREMES.items():
            if CRITICAL.get(metric, suffix) == suffix:
                extreme_key = f"fp8/{metric}/{slot}_{suffix}"
                summary[extreme_key] = extreme(summary.get(extreme_key, value), value)
    return summary


@functools.cache
def current_name(name: str) -> tuple[str, float]:
    """Return the current name of a metric, and the factor that converts it to the current unit."""
    for pattern, replacement, factor in EARLIER_NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(replacement), factor
    return name, 1.0
