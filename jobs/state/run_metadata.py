"""Metadata of a run for MLflow: its parameters, tags, parent submission and status.

The launcher writes it before the first task starts. It is a file, so that changing it does not need MLflow.
"""

import json
import secrets
import time
from pathlib import Path
from typing import Any, Literal, TypedDict

from pixart import records
from pixart.atomic import write_atomically
from slurm.profile import Profile
from slurm.task import attempts

FILE = "tracking.json"
PROFILE = "profile.json"
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
    }
    write_atomically(run / FILE, json.dumps(metadata) + "\n")
    if parent:
        change(parent, children=[*read_description(parent)["children"], str(run)])


def read_description(run: Path) -> Description:
    """Return the metadata of a run. Raises ValueError if it is damaged, FileNotFoundError if it is missing."""
    return records.read(run / FILE, Description)


def read_profile(run: Path) -> Profile:
    """Return the profile of the cluster that a run was last submitted to. Raises ValueError if it is damaged."""
    return records.read(run / PROFILE, Profile)


def change(run: Path, **values: Any) -> None:
    """Replace values in the metadata of a run."""
    write_atomically(run / FILE, json.dumps({**read_description(run), **values}) + "\n")


def add_tags(run: Path, tags: dict[str, str]) -> None:
    change(run, tags={**read_description(run)["tags"], **tags})


def set_status(run: Path, status: Status) -> None:
    """Set the status that MLflow shows for a run."""
    change(run, status=status)


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
