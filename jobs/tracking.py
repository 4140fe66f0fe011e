"""Tracking: tasks append to a journal in their run folder, and the launcher replays it into MLflow.

Tasks need no way to the tracking server, and an embedded store has one writer.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

from jobs.ledger import write_atomically

JOURNAL = "journal.jsonl"
STATE = "mlflow.json"
EXPERIMENT = "pixart"


class Journal:
    """Appends metrics, pictures and results as lines of JSON, each written whole."""

    def __init__(self, run: str | Path) -> None:
        self.path = Path(run) / JOURNAL

    def metrics(self, step: int, values: dict[str, float]) -> None:
        self.append({"step": step, "metrics": values})

    def artifact(self, file: str | Path) -> None:
        self.append({"artifact": str(file)})

    def tags(self, values: dict[str, str]) -> None:
        self.append({"tags": values})

    def append(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"time": time.time(), **line}) + "\n")


def read_journal(run: str | Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The whole lines from byte `offset` on, and where the next read begins."""
    path = Path(run) / JOURNAL
    if not path.exists():
        return [], offset
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()], offset + len(whole)


class Tracker:
    """MLflow runs of one home folder: the server that MLFLOW_TRACKING_URI names, else an embedded sqlite store."""

    def __init__(self, home: str | Path) -> None:
        import logging

        from mlflow.tracking import MlflowClient

        for name in ("mlflow", "alembic"):  # they announce each migration of a new store
            logging.getLogger(name).setLevel(logging.WARNING)
        home = Path(home).absolute()
        self.uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home}/mlflow.db"
        home.mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(self.uri)
        experiment = self.client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            location = (home / "mlartifacts").as_uri() if self.uri.startswith("sqlite") else None
            self.experiment = self.client.create_experiment(EXPERIMENT, artifact_location=location)
        else:
            self.experiment = experiment.experiment_id

    def start(self, run: Path, name: str, parameters: dict[str, Any], tags: dict[str, str], parent: str | None) -> str:
        """Makes the run before its tasks start; its id is kept in the run folder."""
        nested = {"mlflow.parentRunId": parent} if parent else {}
        made = self.client.create_run(self.experiment, run_name=name, tags={**tags, **nested, "pixart.run": str(run)})
        for key, value in parameters.items():
            self.client.log_param(made.info.run_id, key, value)
        write_atomically(run / STATE, json.dumps({"run_id": made.info.run_id, "uri": self.uri, "offset": 0}))
        return made.info.run_id

    def sync(self, run: Path) -> None:
        """Replays what the journal has gained since the last time; a step done twice, after a requeue, counts once."""
        from mlflow.entities import Metric

        state = json.loads((run / STATE).read_text())
        lines, offset = read_journal(run, state["offset"])
        if not lines:
            return
        last_steps: dict[str, int] = state.get("last_steps", {})
        points = []
        for line in lines:
            for key, value in line.get("metrics", {}).items():
                if line["step"] > last_steps.get(key, -1):
                    last_steps[key] = line["step"]
                    points.append(Metric(key, value, int(line["time"] * 1000), line["step"]))
        for begin in range(0, len(points), 1000):  # MLflow's limit for one batch
            self.client.log_batch(state["run_id"], metrics=points[begin : begin + 1000])
        for line in lines:
            for key, value in line.get("tags", {}).items():
                self.client.set_tag(state["run_id"], key, value)
            if "artifact" in line:
                self.client.log_artifact(state["run_id"], line["artifact"])
        write_atomically(run / STATE, json.dumps({**state, "offset": offset, "last_steps": last_steps}))

    def finish(self, run: Path, succeeded: bool) -> None:
        self.sync(run)
        run_id = json.loads((run / STATE).read_text())["run_id"]
        self.client.set_terminated(run_id, "FINISHED" if succeeded else "FAILED")


def run_id(run: str | Path) -> str | None:
    """The MLflow id of a run folder, where it has one."""
    try:
        return json.loads((Path(run) / STATE).read_text())["run_id"]
    except FileNotFoundError:
        return None
