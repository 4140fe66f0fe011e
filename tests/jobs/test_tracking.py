"""Tracking against a real MLflow store."""

import json

import pytest
from mlflow.tracking import MlflowClient

from jobs.tracking import Journal, Tracker, read_journal, run_id


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def begin(home, name: str, parent: str | None = None):
    run = home / "runs" / name
    run.mkdir(parents=True)
    tracker = Tracker(home)
    tracker.start(run, name, {"lr": 0.1}, {"pixart.job": "train"}, parent)
    return tracker, run


def test_journal_is_replayed_once(home):
    tracker, run = begin(home, "a")
    journal = Journal(run)
    for step in range(5):
        journal.metrics(step, {"train/loss": 1.0 / (step + 1), "train/lr": 0.1})
        if step == 2:
            tracker.sync(run)
    picture = run / "samples.png"
    picture.write_bytes(b"png")
    journal.artifact(picture)
    journal.tags({"pixart.source": "there"})
    tracker.sync(run)
    tracker.finish(run, succeeded=True)
    client = MlflowClient(tracker.uri)
    points = client.get_metric_history(run_id(run), "train/loss")
    assert [(point.step, point.value) for point in points] == [(step, 1.0 / (step + 1)) for step in range(5)]
    stored = client.get_run(run_id(run))
    assert stored.data.params == {"lr": "0.1"}
    assert stored.data.tags["pixart.source"] == "there"
    assert stored.info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(run_id(run))] == ["samples.png"]


def test_a_line_cut_off_by_a_kill_is_left_for_later(home):
    _, run = begin(home, "a")
    journal = Journal(run)
    journal.metrics(1, {"a": 1.0})
    with journal.path.open("a") as file:
        file.write('{"step": 2, "metr')
    lines, offset = read_journal(run)
    assert [line["step"] for line in lines] == [1]
    with journal.path.open("a") as file:
        file.write('ics": {"a": 2.0}}\n')
    assert [line["step"] for line in read_journal(run, offset)[0]] == [2]


def test_a_step_done_twice_counts_once(home):
    """After a requeue the steps since the last checkpoint are done again, whether or not they were sent before."""
    tracker, run = begin(home, "a")
    journal = Journal(run)
    for step in (1, 2, 3):
        journal.metrics(step, {"loss": step / 10})
    tracker.sync(run)
    for step in (2, 3, 4, 3, 4, 5):
        journal.metrics(step, {"loss": step / 10})
    tracker.sync(run)
    tracker.sync(run)
    points = MlflowClient(tracker.uri).get_metric_history(run_id(run), "loss")
    assert [(point.step, point.value) for point in points] == [(step, step / 10) for step in range(1, 6)]


def test_runs_are_linked_to_their_parent(home):
    tracker, parent = begin(home, "demo")
    _, child = begin(home, "train", parent=run_id(parent))
    tags = MlflowClient(tracker.uri).get_run(run_id(child)).data.tags
    assert tags["mlflow.parentRunId"] == run_id(parent)
    tracker.finish(child, succeeded=False)
    assert MlflowClient(tracker.uri).get_run(run_id(child)).info.status == "FAILED"
    assert json.loads((child / "mlflow.json").read_text())["offset"] == 0
