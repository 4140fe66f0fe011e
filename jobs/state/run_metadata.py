"""What is said of a run for MLflow: parameters, tags, the submission it belongs to, and how it stands.

The launcher writes it before the first task starts; no process needs MLflow to change it.
"""

import json
import secrets
import time
from pathlib import Path
from typing import Any, Literal

from jobs.state.json_record import read_record
from jobs.state.ledger import write_atomically
from slurm.task import attempts

FILE = "tracking.json"
KEY = "pixart.key"  # tag by which MLflow's run is found again, should a kill come before its id is written down
Status = Literal["RUNNING", "FINISHED", "FAILED"]


def describe(
    run: Path, parameters: dict[str, Any], tags: dict[str, str] | None = None, parent: Path | None = None
) -> None:
    """What MLflow is to say of a run; one that goes on keeps its description."""
    if (run / FILE).exists():
        set_status(run, "RUNNING")
        return
    about = {
        "key": secrets.token_hex(8),
        "begun": time.time(),
        "parameters": parameters,
        "tags": tags or {},
        "parent": str(parent) if parent else None,
        "children": [],
        "status": "RUNNING",
    }
    write_atomically(run / FILE, json.dumps(about) + "\n")
    if parent:
        change(parent, children=[*read_description(parent)["children"], str(run)])


def read_description(run: Path) -> dict[str, Any]:
    return read_record(run / FILE, "key", "begun", "parameters", "tags", "parent", "children", "status")


def change(run: Path, **values: Any) -> None:
    write_atomically(run / FILE, json.dumps({**read_description(run), **values}) + "\n")


def add_tags(run: Path, tags: dict[str, str]) -> None:
    change(run, tags={**read_description(run)["tags"], **tags})


def set_status(run: Path, status: Status) -> None:
    """How a run stands, as MLflow is to say it."""
    change(run, status=status)


def status_of(run: Path) -> Status:
    """A submission stands as the runs that belong to it do."""
    description = read_description(run)
    children = [status_of(Path(child)) for child in description["children"] if (Path(child) / FILE).exists()]
    order: tuple[Status, ...] = ("RUNNING", "FAILED", "FINISHED")
    return min(children, key=order.index) if children else description["status"]


def tags_of(run: Path) -> dict[str, str]:
    description = read_description(run)
    restarts = [line["restart"] for line in attempts(run)]
    tags = {**description["tags"], KEY: description["key"], "pixart.run": str(run)}
    return {**tags, "pixart.attempt": str(max(restarts) + 1)} if restarts else tags
