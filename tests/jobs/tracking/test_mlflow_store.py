"""Tracking with real MLflow stores, embedded and on a server, with processes killed at every write."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from jobs.state.journal import Journal
from jobs.state.run_metadata import add_tags, describe, set_status
from jobs.tracking.mlflow_store import STATE, StoreError, Tracker, needs_sync, run_id
from jobs.tracking.sync import sync_in_background, try_sync
from tests.support import reporting_tasks

ROOT = Path(__file__).parents[3]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Home whose runs are tracked in the embedded store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def begin(home, name: str, parent: Path | None = None):
    """Create a run folder and return the tracker of the home and the folder."""
    run = home / "runs" / name
    run.mkdir(parents=True)
    describe(run, {"lr": 0.1}, {"pixart.job": "train"}, parent)
    return Tracker(home), run


def stored_points(tracker: Tracker, run: Path) -> list[tuple[str, int, float]]:
    """Return all points of a run in the store, sorted, with any duplicates."""
    identifier = run_id(run)
    assert identifier
    keys = tracker.client.get_run(identifier).data.metrics
    stored = [point for key in keys for point in tracker.client.get_metric_history(identifier, key)]
    return sorted((point.key, point.step, point.value) for point in stored)


def expected_points(count: int, steps: int) -> list[tuple[str, int, float]]:
    return sorted((key, step, value) for (key, step), value in reporting_tasks.expected(count, steps).items())


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


def test_repeated_step_counts_once(home):
    """After a requeue, the steps since the last checkpoint are repeated, whether or not they were sent before."""
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


def test_status_of_a_submission_follows_its_runs(home):
    """A parent run has the status of its children, even if a child is synced first."""
    tracker, parent = begin(home, "demo")
    children = [begin(home, name, parent=parent)[1] for name in ("caption", "train")]
    client = MlflowClient(tracker.uri)

    def status() -> str:
        return client.get_run(run_id(parent)).info.status

    set_status(children[0], "FINISHED")
    tracker.sync(children[0])
    assert status() == "RUNNING"
    set_status(children[1], "FAILED")
    tracker.sync(children[1])
    assert status() == "FAILED"
    stored = client.get_run(run_id(children[1]))
    assert stored.data.tags["mlflow.parentRunId"] == run_id(parent)
    assert stored.info.status == "FAILED"
    describe(children[1], {"lr": 0.2})  # the run is resumed and keeps its parameters
    tracker.sync(children[1])
    stored = client.get_run(run_id(children[1]))
    assert (stored.info.status, status()) == ("RUNNING", "RUNNING")
    assert stored.data.params == {"lr": "0.1"}
    set_status(children[1], "FINISHED")
    tracker.sync(children[1])
    assert status() == "FINISHED"


def test_later_tags_and_incidents_are_sent(home):
    tracker, run = begin(home, "a")
    tracker.sync(run)
    add_tags(run, {"pixart.jobs": "17"})
    Journal(run).incident(3, "step left out")
    tracker.sync(run)
    tags = tracker.client.get_run(run_id(run)).data.tags
    assert (tags["pixart.jobs"], tags["pixart.last_incident"]) == ("17", "step 3: step left out")
    assert not needs_sync(run)


def test_previews_become_images_by_step(home):
    """A repeated sync, as after a kill, keeps their names."""
    tracker, run = begin(home, "a")
    (run / "previews").mkdir()
    for step in (100, 200):
        picture = run / f"previews/step-{step:08d}.png"
        Image.new("RGB", (512, 256), "red").save(picture)
        Journal(run).artifact(picture)
    Journal(run).artifact(run / "removed.png")
    for _ in range(2):
        tracker.sync(run)
        (run / STATE).unlink()
    paths = [file.path for file in tracker.client.list_artifacts(tracker.find_or_create(run), "images")]
    assert len(paths) == 4
    assert sorted(int(path.split("+")[2]) for path in paths if path.endswith(".png")) == [100, 200]


def test_a_store_that_was_removed_is_filled_again(home):
    tracker, run = begin(home, "a")
    Journal(run).metrics(1, {"a": 1.0})
    tracker.sync(run)
    (home / "mlflow.db").unlink()
    again = Tracker(home)
    again.sync(run)
    assert stored_points(again, run) == [("a", 1, 1.0)]


def test_deleted_mlflow_run_stays_deleted(home):
    tracker, run = begin(home, "a")
    tracker.sync(run)
    tracker.client.delete_run(run_id(run))
    Journal(run).metrics(1, {"a": 1.0})
    tracker.sync(run)
    assert tracker.client.get_run(run_id(run)).info.lifecycle_stage == "deleted"


KILLED = """
import os, signal, sys
from pathlib import Path
from jobs.tracking import mlflow_store

tracker, run, left = mlflow_store.Tracker(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
def dying(call):
    def counted(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*arguments, **named)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return counted
for name in ("create_run", "log_batch", "set_tag", "log_artifact"):
    setattr(tracker.client, name, dying(getattr(tracker.client, name)))
mlflow_store.save = dying(mlflow_store.save)
for _ in range(int(sys.argv[4])):
    if not os.fork():
        tracker.sync(run)
        os._exit(0)
    left += 1
    os.wait()
"""


@pytest.mark.slow
def test_kill_before_and_after_every_write(home):
    """Forty syncs are killed at later and later points, before or after a write, and store every point once.

    The journal contains repeated steps.
    """
    tracker, run = begin(home, "a")
    for attempt in range(2):
        journal = Journal(run)
        for step in range(attempt * 5, 10):
            journal.metrics(step, {"loss": step / 8, "lr": 0.5})
    (run / "page.html").write_text("page")
    Journal(run).artifact(run / "page.html")
    tracker.experiment  # noqa: B018 - creates the store
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(home), str(run), "1", "40"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    runs = tracker.client.search_runs([tracker.experiment])
    assert [one.info.run_name for one in runs] == ["a"]
    tracker.sync(run)
    assert stored_points(tracker, run) == sorted(
        (key, step, value) for step in range(10) for key, value in (("loss", step / 8), ("lr", 0.5))
    )
    assert [file.path for file in tracker.client.list_artifacts(run_id(run))] == ["page.html"]


def report(run: Path, count: int, steps: int, kills: int) -> None:
    """Run tasks that report to the journal of a run, and kill `kills` of them."""
    words = [sys.executable, "-m", "tests.support.reporting_tasks", str(run), str(count), str(steps), str(kills)]
    subprocess.run(words, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_256_tasks_at_once_and_a_cold_embedded_store(home):
    """No run is lost, no point is stored twice, and runs with and without killed tasks have equal metrics."""
    tracker, calm = begin(home, "calm")
    _, disturbed = begin(home, "disturbed")
    workers = [sync_in_background(home, [disturbed, calm]) for _ in range(2)]
    report(disturbed, 256, 20, 50)
    report(calm, 256, 20, 0)
    assert [worker.wait() for worker in workers] == [0, 0], (disturbed / "tracking.log").read_text()
    for run in (calm, disturbed):
        set_status(run, "FINISHED")
        tracker.sync(run)
    assert stored_points(tracker, calm) == stored_points(tracker, disturbed) == expected_points(256, 20)
    statuses = [one.info.status for one in tracker.client.search_runs([tracker.experiment])]
    assert statuses == ["FINISHED", "FINISHED"]


@pytest.mark.slow
def test_256_tasks_with_an_unreachable_server(home, monkeypatch, mlflow_server):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    tracker, run = begin(home, "served")
    assert try_sync(tracker, run)
    worker = subprocess.Popen(
        [sys.executable, "-m", "tests.support.reporting_tasks", str(run), "256", "20", "50"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    try_sync(tracker, run)
    mlflow_server.stop()
    assert not try_sync(tracker, run)
    with pytest.raises(StoreError, match="request failed"):
        tracker.sync(run)
    assert worker.wait() == 0
    mlflow_server.start()
    set_status(run, "FINISHED")
    assert try_sync(tracker, run)
    assert stored_points(tracker, run) == expected_points(256, 20)
    assert tracker.client.get_run(run_id(run)).info.status == "FINISHED"


@pytest.mark.slow
def test_second_store_receives_the_complete_run(home, monkeypatch, mlflow_server):
    tracker, run = begin(home, "moved")
    report(run, 4, 5, 0)
    tracker.sync(run)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    other = Tracker(home)
    other.sync(run)
    assert stored_points(other, run) == expected_points(4, 5)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    tracker = Tracker(home)
    tracker.sync(run)
    assert stored_points(tracker, run) == expected_points(4, 5)


@pytest.mark.slow
def test_a_cold_store_takes_many_processes_at_once(home):
    """Each process creates its runs; two processes that sync the same run create it once."""
    folders = [begin(home, f"run-{number}")[1] for number in range(4)]
    for folder in folders:
        Journal(folder).metrics(1, {"a": 1.0})
    workers = [sync_in_background(home, group) for group in (folders[:2], folders[2:], folders[::-1])]
    assert [worker.wait() for worker in workers] == [0, 0, 0], (folders[0] / "tracking.log").read_text()
    tracker = Tracker(home)
    runs = tracker.client.search_runs([tracker.experiment])
    assert sorted(run.info.run_name for run in runs) == sorted(folder.name for folder in folders)
    for folder in folders:
        assert len(tracker.client.get_metric_history(run_id(folder), "a")) == 1


class RefusedError(Exception):
    """An error of an HTTP client with the status of the response."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status} from a proxy")
        self.response = SimpleNamespace(status_code=status)


@pytest.fixture
def with_artifacts(home):
    """Tracker and run with a metric, two artifacts and a later metric."""
    tracker, run = begin(home, "a")
    journal = Journal(run)
    journal.metrics(1, {"loss": 1.0})
    for name in ("large.html", "small.html"):
        (run / name).write_text(name)
        journal.artifact(run / name)
    journal.metrics(2, {"loss": 0.5})
    return tracker, run


def artifacts(tracker, run):
    return [file.path for file in tracker.client.list_artifacts(run_id(run))]


@pytest.mark.parametrize("status", [504, 413])
def test_an_artifact_that_is_refused_holds_up_nothing_else(with_artifacts, monkeypatch, status):
    """A file that a proxy cannot take now is sent later; one that it never takes is noted and skipped."""
    tracker, run = with_artifacts
    send_file = tracker.send_file

    def refuse_large_files(identifier, file, moment):
        if file.name == "large.html":
            raise RefusedError(status)
        send_file(identifier, file, moment)

    monkeypatch.setattr(tracker, "send_file", refuse_large_files)
    assert try_sync(tracker, run) == (status == 413)
    assert stored_points(tracker, run) == [("loss", 1, 1.0), ("loss", 2, 0.5)]
    assert artifacts(tracker, run) == ["small.html"]
    assert needs_sync(run) == (status == 504)
    assert f"large.html cannot be sent; RefusedError: {status} from a proxy" in (run / "tracking.log").read_text()
    monkeypatch.undo()
    assert try_sync(tracker, run)
    assert artifacts(tracker, run) == (["large.html", "small.html"] if status == 504 else ["small.html"])
    assert not needs_sync(run)


@pytest.mark.parametrize("uri", ["sqlite:///{folder}", "postgresql://nowhere/db", "gopher://x", "http://127.0.0.1:9"])
def test_a_store_that_cannot_be_opened_fails_no_job(home, monkeypatch, uri):
    """A directory, a missing driver, an unknown scheme and a closed port: one line in the log, and no exception."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.format(folder=home))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    tracker, run = begin(home, "a")
    Journal(run).metrics(1, {"loss": 1.0})
    begun = time.monotonic()
    assert not try_sync(tracker, run)
    assert time.monotonic() - begun < 20
    assert len((run / "tracking.log").read_text().splitlines()) == 1
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    tracker = Tracker(home)
    assert try_sync(tracker, run)
    assert stored_points(tracker, run) == [("loss", 1, 1.0)]
