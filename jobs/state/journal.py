"""The journal of a run: metrics, pictures and incidents as lines of JSON, which tasks append and the launcher reads.

Every process appends to a file of its own in RUN/journal, since on a network file system two nodes that append to one
file overwrite each other. A line is one write, so that a kill leaves whole lines and at most one cut off at the end.
Imports nothing heavy: a training step waits for it.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

FOLDER = "journal"
TAIL_BYTES = 1 << 20  # the FP8 figures of all linears are one line
EXTREMES: dict[str, Callable[..., float]] = {"lowest": min, "highest": max}
SERIOUS = {"headroom": "lowest", "overflow_share": "highest"}  # of the others both are told
Ends = dict[str, int]  # of files by name: the byte after the last line that was read


class Journal:
    """Appends for one process; the file is made with the first line, and named to sort by that moment.

    With `name` it is a file that processes share which take turns.
    """

    def __init__(self, run: str | Path, name: str | None = None) -> None:
        self.folder, self.name = Path(run) / FOLDER, name
        self.file: FileIO | None = None

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.append({"step": step, "metrics": {key: float(value) for key, value in values.items()}})

    def artifact(self, file: str | Path) -> None:
        """A file that MLflow is to have; `previews/step-00000400.png` becomes the picture of that step."""
        self.append({"artifact": str(file)})

    def tags(self, values: Mapping[str, str]) -> None:
        self.append({"tags": dict(values)})

    def incident(self, step: int, text: str) -> None:
        """What somebody who looks at the curves must know: a step left out, a fallback, a spike."""
        self.append({"incident": text, "step": step})

    def append(self, line: Mapping[str, Any]) -> None:
        if self.file is None:
            self.file = self.open()
        self.file.write((json.dumps({"time": time.time(), **line}) + "\n").encode())

    def open(self) -> FileIO:
        self.folder.mkdir(parents=True, exist_ok=True)
        name = self.name or f"{time.time_ns()}-{socket.gethostname()}-{os.getpid()}"
        file = (self.folder / f"{name}.jsonl").open("ab+", buffering=0)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # what a kill has cut off stays a line of its own
                file.write(b"\n")
        return file


def files(run: str | Path) -> list[Path]:
    return sorted((Path(run) / FOLDER).glob("*.jsonl"))


def read_journal(
    run: str | Path, begin: Mapping[str, int] | None = None, end: Mapping[str, int] | None = None
) -> tuple[list[dict[str, Any]], Ends]:
    """The whole lines from `begin` to `end`, and where the next read begins; what a kill has cut off is left out."""
    lines: list[dict[str, Any]] = []
    ends: Ends = {}
    for path in files(run):
        first = (begin or {}).get(path.name, 0)
        length = -1 if end is None else end.get(path.name, 0) - first
        with path.open("rb") as file:
            file.seek(first)
            content = file.read(length)
        whole = content[: content.rfind(b"\n") + 1]
        lines += parsed(whole)
        ends[path.name] = first + len(whole)
    return lines, ends


def read_tail(run: str | Path) -> list[dict[str, Any]]:
    """The last lines of every file: enough to say how a run stands, however long it is."""
    lines: list[dict[str, Any]] = []
    for path in files(run):
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            lines += parsed(file.read())
    return lines


def parsed(content: bytes) -> Iterator[dict[str, Any]]:
    for line in content.splitlines():
        with suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):  # of a line that was cut off at its beginning, a number may be left
                yield found


def points(lines: list[dict[str, Any]], seen: set[tuple[str, int]]) -> Iterator[tuple[str, float, float, int]]:
    """Key, value, time in seconds and step of every metric, a step that was done twice once; adds to `seen`."""
    for line in lines:
        for key, value in summarized(line.get("metrics", {})).items():
            if (key, line["step"]) not in seen:
                seen.add((key, line["step"]))
                yield key, value, line["time"], line["step"]


def summarized(metrics: Mapping[str, float]) -> dict[str, float]:
    """With the extremes of `fp8/WHAT/LINEAR.SLOT` over all linears: a large model has thousands of them."""
    found: dict[str, float] = {}
    for key, value in metrics.items():
        if not key.startswith("fp8/"):
            found[key] = value
            continue
        what, slot = key.split("/")[1], key.rpartition(".")[2]
        for name, extreme in EXTREMES.items():
            if SERIOUS.get(what, name) == name:
                own = f"fp8/{what}/{slot}_{name}"
                found[own] = extreme(found.get(own, value), value)
    return found
