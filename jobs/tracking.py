"""Tracking: all that is to be told is written into the run folder first, and brought into MLflow from there.

Tasks append to a journal, so they need no way to the tracking server; the launcher describes the run and how it ended.
Bringing it into MLflow takes as long as it takes, may fail, and may be done again: nothing counts twice.
"""

import fcntl
import functools
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jobs.ledger import write_atomically

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

JOURNAL = "journal.jsonl"
DESCRIPTION = "tracking.json"  # what the launcher says
STATE = "mlflow.json"  # what MLflow has of it
LOG = "tracking.log"
LOCK = ".mlflow.lock"
EXPERIMENT = "pixart"
Status = Literal["RUNNING", "FINISHED", "FAILED"]
BATCH = 1000  # metrics that MLflow takes at once


class Journal:
    """Appends metrics, pictures and results as lines of JSON, each written whole."""

    def __init__(self, run: str | Path) -> None:
        self.path = Path(run) / JOURNAL
        with suppress(FileNotFoundError):
            if self.path.read_bytes()[-1:] not in (b"", b"\n"):  # what a kill has cut off stays a line of its own
                self.path.open("a").write("\n")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.append({"step": step, "metrics": values})

    def incident(self, step: int, text: str) -> None:
        """What somebody who looks at the curves should know of a step."""
        self.append({"step": step, "incident": text})

    def artifact(self, file: str | Path) -> None:
        self.append({"artifact": str(file)})

    def tags(self, values: dict[str, str]) -> None:
        self.append({"tags": values})

    def append(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"time": time.time(), **line}) + "\n")


def read_journal(run: str | Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The whole lines from byte `offset` on, and where the next read begins; what a kill has cut off is left out."""
    path = Path(run) / JOURNAL
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    lines = []
    for line in whole.splitlines():
        with suppress(ValueError):
            lines.append(json.loads(line))
    return lines, offset + len(whole)


def describe(
    run: Path, parameters: dict[str, Any], tags: dict[str, str] | None = None, parent: Path | None = None
) -> None:
    """What MLflow is to say of a run; one that goes on keeps its description."""
    if (run / DESCRIPTION).exists():
        set_status(run, "RUNNING")
        return
    about = {"parameters": parameters, "tags": tags or {}, "parent": str(parent) if parent else None}
    write_atomically(run / DESCRIPTION, json.dumps({**about, "status": "RUNNING"}) + "\n")


def set_status(run: Path, status: Status) -> None:
    """How a run stands, as MLflow is to say it."""
    description = json.loads((run / DESCRIPTION).read_text())
    write_atomically(run / DESCRIPTION, json.dumps({**description, "status": status}) + "\n")


class Tracker:
    """The MLflow store of a home folder: the server that MLFLOW_TRACKING_URI names, else an embedded sqlite file."""

    def __init__(self, home: str | Path) -> None:
        self.home = Path(home).absolute()
        self.uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.home}/mlflow.db"

    @functools.cached_property
    def client(self) -> "MlflowClient":
        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):  # they announce each migration of a new store
            logging.getLogger(name).setLevel(logging.WARNING)
        return MlflowClient(self.uri)

    @functools.cached_property
    def experiment(self) -> str:
        with locked(self.home):  # a new sqlite store takes one client at a time
            found = self.client.get_experiment_by_name(EXPERIMENT)
            if found is not None:
                return found.experiment_id
            location = (self.home / "mlartifacts").as_uri() if self.uri.startswith("sqlite") else None
            return self.client.create_experiment(EXPERIMENT, artifact_location=location)

    def sync(self, run: Path) -> None:
        """Brings into MLflow what it lacks of a run; a step done twice, after a requeue, counts once."""
        experiment = self.experiment
        with locked(run):
            description = json.loads((run / DESCRIPTION).read_text())
            state = self.state(run, description, experiment)
            state = self.replay(run, state)
            if state["status"] == description["status"]:
                return
            if description["status"] == "RUNNING":
                self.client.update_run(state["run_id"], status="RUNNING")
            else:
                self.client.set_terminated(state["run_id"], description["status"])
            write_atomically(run / STATE, json.dumps({**state, "status": description["status"]}))

    def state(self, run: Path, description: dict[str, Any], experiment: str) -> dict[str, Any]:
        """What MLflow has of the run, which is made there if it has nothing; its parent comes first."""
        if (run / STATE).exists():
            return json.loads((run / STATE).read_text())
        tags = {**description["tags"], "pixart.run": str(run)}
        if description["parent"]:
            parent = Path(description["parent"])
            if run_id(parent) is None:
                self.sync(parent)
            tags["mlflow.parentRunId"] = run_id(parent)
        identifier = self.client.create_run(experiment, run_name=run.name, tags=tags).info.run_id
        for key, value in description["parameters"].items():
            self.client.log_param(identifier, key, value)
        state = {"run_id": identifier, "uri": self.uri, "offset": 0, "last_steps": {}, "status": "RUNNING"}
        write_atomically(run / STATE, json.dumps(state))
        return state

    def replay(self, run: Path, state: dict[str, Any]) -> dict[str, Any]:
        from mlflow.entities import Metric

        lines, offset = read_journal(run, state["offset"])
        if not lines:
            return state
        last_steps: dict[str, int] = dict(state["last_steps"])
        points = []
        for line in lines:
            for key, value in line.get("metrics", {}).items():
                if line["step"] > last_steps.get(key, -1):
                    last_steps[key] = line["step"]
                    points.append(Metric(key, value, int(line["time"] * 1000), line["step"]))
        for begin in range(0, len(points), BATCH):
            self.client.log_batch(state["run_id"], metrics=points[begin : begin + BATCH])
        for line in lines:
            for key, value in line.get("tags", {}).items():
                self.client.set_tag(state["run_id"], key, value)
            if "artifact" in line:
                self.client.log_artifact(state["run_id"], line["artifact"])
        state = {**state, "offset": offset, "last_steps": last_steps}
        write_atomically(run / STATE, json.dumps(state))
        return state


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sync_in_background(home: Path, folders: Sequence[Path]) -> subprocess.Popen[bytes]:
    """Brings runs into MLflow by a process that outlives this one: importing MLflow takes longer than submitting."""
    with (folders[0] / LOG).open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "jobs.tracking", str(home), *map(str, folders)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def run_id(run: str | Path) -> str | None:
    """The MLflow id of a run folder, where it has one."""
    try:
        return json.loads((Path(run) / STATE).read_text())["run_id"]
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    for folder in sys.argv[2:]:
        Tracker(sys.argv[1]).sync(Path(folder))
