"""Metadata of a run for MLflow: its parameters, tags, parent submission and status.

The launcher writes it before the first task starts. It is a file, so that changing it does not need MLflow.
"""

import json
import secrets
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from jobs.state.journal import read_tail
from pixart import records
from pixart.atomic import write_atomically
from pixart.relocation import home_of, portable, present
from slurm.profile import Profile
from slurm.task import RESULT, attempts

FILE = "tracking.json"
PROFILE = "profile.json"
CONFIGURATION = "config.json"  # the recipe of the run
KEY = "pixart.key"  # tag that finds the MLflow run if a process was killed before saving its id
Status = Literal["RUNNING", "FINISHED", "FAILED"]


class Description(TypedDict):
    """The metadata of a run."""

    key: str
    begun: records.Moment
    parameters: dict[str, Any]
    tags: dict[str, str]
    parent: str | None
    children: list[str]
    status: Status
    ended: NotRequired[records.Moment | None]  # end of the work, once the status is final
    report: NotRequired[str]  # tracker beside MLflow


def describe(
    run: Path, parameters: dict[str, Any], tags: dict[str, str] | None = None, parent: Path | None = None
) -> None:
    """Write the metadata of a new run; a resumed run keeps its metadata and gets the status RUNNING."""
    if (run / FILE).exists():
        set_status(run, "RUNNING")
        return
    metadata = {
        "key": secrets.token_hex(8),
        "begun": time.time(),
        "parameters": parameters,
        "tags": tags or {},
        "parent": str(parent) if parent else None,
        "children": [],
        "status": "RUNNING",
        "ended": None,
    }
    write(run, metadata)
    if parent:
        change(parent, children=[*read_description(parent)["children"], str(run)])


def read_description(run: Path) -> Description:
    """Return the metadata of a run. Raises ValueError if it is damaged, FileNotFoundError if it is missing."""
    return present(records.read(run / FILE, Description), home_of(run))


def read_profile(run: Path) -> Profile:
    """Return the profile of the cluster that a run was last submitted to. Raises ValueError if it is damaged."""
    return records.read(run / PROFILE, Profile)


def change(run: Path, **values: Any) -> None:
    """Replace values in the metadata of a run."""
    write(run, {**read_description(run), **values})


def write(run: Path, metadata: Mapping[str, Any]) -> None:
    """Write the metadata of a run, with paths in the home folder relative to it."""
    write_atomically(run / FILE, json.dumps(portable(metadata, home_of(run))) + "\n")


def add_tags(run: Path, tags: dict[str, str]) -> None:
    change(run, tags={**read_description(run)["tags"], **tags})


def set_status(run: Path, status: Status, ended: float | None = None) -> None:
    """Set the status that MLflow shows for a run; with a final one, also the end of its work.

    The end is `ended`, in seconds since the epoch, else that of the last sign of work; it stays while the status does,
    so that neither a later query nor a copy of the folder changes it.
    """
    description = read_description(run)
    if status == "RUNNING":
        change(run, status=status, ended=None)
    elif status != description["status"]:
        change(run, status=status, ended=ended or last_activity(run) or time.time())


def last_activity(run: Path, *, recorded: bool = False) -> float | None:
    """Return the time of the last sign of work: a start, a journal line, a log or the result; None before any.

    With `recorded`, only times in records count: the times of files change when a folder is copied.
    """
    files = [] if recorded else [run / RESULT, *(run / "logs").glob("*_log.*")]
    moments = [path.stat().st_mtime for path in files if path.exists()]
    moments += [line["time"] for line in read_tail(run) if "metrics" in line or "tags" in line]
    return max([*moments, *start_times(run)], default=None)


def start_times(run: Path) -> list[float]:
    """Return the times at which ranks and tasks of a run have started, in seconds since the epoch."""
    return [datetime.fromisoformat(line["time"]).timestamp() for line in attempts(run)]


def work_times(run: Path) -> tuple[float | None, float | None]:
    """Return when the work of a run began and ended, in seconds since the epoch; None for what has not happened.

    The work of a submission is that of its runs. A run that ended before any task started has both at its submission.
    """
    description = read_description(run)
    if children := [Path(child) for child in description["children"] if (Path(child) / FILE).exists()]:
        begins, ends = zip(*(run_times(child) for child in children), strict=True)
        known = [begin for begin in begins if begin is not None]
        ended = [end for end in ends if end is not None]
        return min(known, default=None), max(ended) if len(ended) == len(children) else None
    return run_times(run)


def run_times(run: Path) -> tuple[float | None, float | None]:
    """Return `work_times` of a folder that is no submission."""
    description = read_description(run)
    begin = min(start_times(run), default=None)
    if begin is None:
        begin = min((line["time"] for line in read_tail(run) if "metrics" in line), default=None)
    if description["status"] == "RUNNING":
        return begin, None
    end = description.get("ended")  # runs of version 0.1 have none
    end = end or last_activity(run, recorded=True) or description["begun"]
    return (description["begun"] if begin is None else begin), end


def status_of(run: Path) -> Status:
    """Return the status of a run; that of a submission follows from the runs in it, which have no runs in them."""
    description = read_description(run)
    children = [Path(child) for child in description["children"] if (Path(child) / FILE).exists()]
    statuses = [read_description(child)["status"] for child in children]
    order: tuple[Status, ...] = ("RUNNING", "FAILED", "FINISHED")
    return min(statuses, key=order.index) if statuses else description["status"]


def tags_of(run: Path) -> dict[str, str]:
    """Return the tags of the MLflow run: those of the metadata, the run folder and the number of the attempt."""
    description = read_description(run)
    restarts = [line["restart"] for line in attempts(run)]
    tags = {**description["tags"], KEY: description["key"], "pixart.run": str(run)}
    return {**tags, "pixart.attempt": str(max(restarts) + 1)} if restarts else tags


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested sections as one mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
