"""Export to Weights & Biases by the real package in offline mode; its file is read back with its own messages."""

import json
import time
from pathlib import Path

import pytest

from jobs.state.journal import Journal
from jobs.state.run_metadata import describe, read_description, set_status
from jobs.tracking.mlflow_store import Tracker, run_id
from jobs.tracking.wandb_export import NAME, export
from tests.support import reporting_tasks, wandb_file

pytest.importorskip("wandb", reason="needs the extra wandb")
STEPS = 6


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """Folder of a new run."""
    for name in ("MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    submission, run = tmp_path / "submissions/demo", tmp_path / "runs/train-1"
    for folder in (submission, run):
        folder.mkdir(parents=True)
    describe(submission, {}, {"pixart.job": "demo"})
    describe(run, {"lr": 0.1}, {"pixart.job": "train"}, submission)
    (run / "config.json").write_text(json.dumps({"stage1": {"lr": 0.1}}))
    return run


def curves(rows: list[dict]) -> dict[str, list[tuple[float, float]]]:
    """Return the points of every metric in the order of the history."""
    drawn: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        for key, value in row.items():
            axis = "system/seconds" if key.startswith("system/") else "step"
            if not key.startswith("_") and key not in ("step", "system/seconds"):
                drawn.setdefault(key, []).append((row[axis], value))
    return drawn


def mlflow_curves(run: Path) -> dict[str, list[tuple[float, float]]]:
    tracker = Tracker(run.parents[1])
    tracker.sync(run)
    identifier = run_id(run)
    names = tracker.client.get_run(identifier).data.metrics.keys() - {"system/queue_seconds"}
    histories = {name: tracker.client.get_metric_history(identifier, name) for name in names}
    return {name: sorted((one.step, one.value) for one in points) for name, points in histories.items()}


@pytest.mark.slow
def test_a_run_with_a_kill_and_a_requeue_has_the_curves_of_mlflow(run):
    """Steps are repeated after each restart, a killed process leaves half a line, and exports come in between."""
    assert export(run) is None  # no work has begun
    for attempt in range(3):
        journal = Journal(run, f"attempt-{attempt}")
        for step in range(2 * attempt, STEPS):
            metrics = {"train/loss": 1 / (step + 1), "fp8/headroom/blocks.0.input": 3.0, "train/lr": 0.1}
            journal.metrics(step, metrics)
        journal.metrics(30 * attempt, {"system/node_0/cpu_utilization_percentage": 50.0})
        with (run / "journal" / f"attempt-{attempt}.jsonl").open("a") as file:
            file.write('{"time": 1, "step": 1, "met')
        if attempt == 0:
            first = export(run)
    set_status(run, "FINISHED", time.time())
    folder = export(run)
    assert folder
    assert not first.exists() or first == folder
    assert [path.name for path in (run / NAME).glob("offline-run-*")] == [folder.name]
    metadata, rows = wandb_file.read(folder)
    assert (metadata["id"], metadata["name"], metadata["group"]) == (read_description(run)["key"], "train-1", "demo")
    assert metadata["config"]["stage1"] == {"lr": 0.1}
    drawn = curves(rows)
    assert drawn == mlflow_curves(run)
    assert drawn["train/loss"] == [(step, 1 / (step + 1)) for step in range(STEPS)]
    again = export(run)
    assert curves(wandb_file.read(again)[1]) == drawn


@pytest.mark.slow
def test_killed_tasks_have_the_curves_of_tasks_that_were_not(run):
    reporting_tasks.main(str(run), 8, 10, 4)
    _, rows = wandb_file.read(export(run))
    assert curves(rows) == mlflow_curves(run)
