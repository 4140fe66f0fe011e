"""Tracking against a real MLflow store."""

from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from jobs.tracking import Journal, Tracker, describe, read_journal, run_id, set_status, publish_in_background


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def begin(home, name: str, parent: Path | None = None):
    run = home / "runs" / name
    run.mkdir(parents=True)
    describe(run, {"lr": 0.1}, {"pixart.job": "train"}, parent)
    return Tracker(home), run


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
    set_status(run, "FINISHED")
    tracker.sync(run)
    client = MlflowClient(tracker.uri)
    points = client.get_metric_history(run_id(run), "train/loss")
    assert [(point.step, point.value) for point in points] == [(step, 1.0 / (step + 1)) for step in range(5)]
    stored = client.get_run(run_id(run))
    assert stored.data.params == {"lr": "0.1"}
    assert stored.data.tags["pixart.source"] == "there"
    assert stored.info.status == "FINISHED"
    assert [file.path for file in client.list_artifacts(run_id(run))] == ["samples.png"]


def test_a_line_cut_off_by_a_kill_is_left_out(home):
    """Be it still being written, or the last word of an attempt that another has followed."""
    _, run = begin(home, "a")
    journal = Journal(run)
    journal.metrics(1, {"a": 1.0})
    with journal.path.open("a") as file:
        file.write('{"step": 2, "metr')
    lines, offset = read_journal(run)
    assert [line["step"] for line in lines] == [1]
    Journal(run).metrics(2, {"a": 2.0})
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
    """Also where the child is brought into MLflow first."""
    tracker, parent = begin(home, "demo")
    _, child = begin(home, "train", parent=parent)
    set_status(child, "FAILED")
    tracker.sync(child)
    stored = MlflowClient(tracker.uri).get_run(run_id(child))
    assert stored.data.tags["mlflow.parentRunId"] == run_id(parent)
    assert stored.info.status == "FAILED"
    describe(child, {"lr": 0.2})  # it goes on, with the parameters that it has
    tracker.sync(child)
    stored = MlflowClient(tracker.uri).get_run(run_id(child))
    assert stored.info.status == "RUNNING"
    assert stored.data.params == {"lr": "0.1"}


@pytest.mark.slow
def test_a_cold_store_takes_many_processes_at_once(home):
    """Each makes its own run, and two that bring in the same one make it once."""
    folders = [begin(home, f"run-{number}")[1] for number in range(4)]
    for folder in folders:
        Journal(folder).metrics(1, {"a": 1.0})
    workers = [publish_in_background(home, group) for group in (folders[:2], folders[2:], folders[::-1])]
    assert [worker.wait() for worker in workers] == [0, 0, 0], (folders[0] / "tracking.log").read_text()
    tracker = Tracker(home)
    found = tracker.client.search_runs([tracker.experiment])
    assert sorted(run.info.run_name for run in found) == sorted(folder.name for folder in folders)
    for folder in folders:
        assert len(tracker.client.get_metric_history(run_id(folder), "a")) == 1
