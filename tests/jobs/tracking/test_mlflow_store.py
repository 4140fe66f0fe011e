"""Tracking with real MLflow stores, embedded and on a server, with processes killed at every write."""

import dataclasses
import json
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from jobs.state.journal import Journal
from jobs.state.run_metadata import add_tags, change, describe, set_status
from jobs.tracking.mlflow_entities import QUEUE
from jobs.tracking.mlflow_store import STATE, StoreError, Tracker, needs_sync, run_id
from jobs.tracking.sync import sync_in_background, try_sync
from pixart.recipes import demo
from slurm.task import ATTEMPTS
from tests.support import reporting_tasks

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Home whose runs are tracked in the embedded store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def begin(home, name: str, parent: Path | None = None):
    """Create a run folder whose work has begun, and return the tracker of the home and the folder."""
    run = home / "runs" / name
    run.mkdir(parents=True)
    describe(run, {"lr": 0.1}, {"pixart.job": "train"}, parent)
    start(run, time.time())
    return Tracker(home), run


def start(run: Path, moment: float, restart: int = 0) -> None:
    """Record the start of rank 0, as a task does."""
    at = datetime.fromtimestamp(moment).astimezone().isoformat(timespec="milliseconds")
    line = {"job": "1", "rank": 0, "restart": restart, "arguments": [], "node": "n1", "time": at}
    with (run / ATTEMPTS).open("a") as file:
        file.write(json.dumps(line) + "\n")


def stored_points(tracker: Tracker, run: Path) -> list[tuple[str, int, float]]:
    """Return all points of a run in the store, sorted, with any duplicates."""
    identifier = run_id(run)
    assert identifier
    keys = [key for key in tracker.client.get_run(identifier).data.metrics if key != QUEUE]
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
    (parent / ATTEMPTS).unlink()  # only runs have tasks
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


def test_start_and_end_are_those_of_the_work(home):
    """Neither the submission nor a later query of the status is: the time in the queue is a figure of its own."""
    submission = home / "submissions/train"
    submission.mkdir(parents=True)
    describe(submission, {}, {"pixart.job": "train"})
    run = home / "runs/train"
    run.mkdir(parents=True)
    describe(run, {"stage": 1}, {"pixart.job": "train"}, submission)
    tracker, now = Tracker(home), time.time()
    change(run, begun=now - 5000)
    change(submission, begun=now - 5000)
    tracker.sync(run)
    assert run_id(run) is None  # it waits in the queue
    assert not needs_sync(run)
    start(run, now - 2000)
    tracker.sync(run)
    start(run, now - 1000, restart=1)  # a requeue is no new start
    set_status(run, "FINISHED", now - 500)
    set_status(run, "FINISHED")  # by a later `status`
    for _ in range(2):
        tracker.sync(run)
        for folder in (run, submission):
            info = tracker.client.get_run(run_id(folder)).info
            assert info.start_time == pytest.approx((now - 2000) * 1000, abs=2)
            assert info.end_time == pytest.approx((now - 500) * 1000, abs=2)
        (run / STATE).unlink()
        (submission / STATE).unlink()
    tracker.sync(run)
    assert tracker.client.get_run(run_id(run)).data.metrics[QUEUE] == pytest.approx(3000, abs=0.01)


def test_a_run_that_ended_in_the_queue_has_no_duration(home):
    run = home / "runs/train"
    run.mkdir(parents=True)
    describe(run, {}, {"pixart.job": "train"})
    set_status(run, "FAILED")
    tracker = Tracker(home)
    tracker.sync(run)
    stored = tracker.client.get_run(run_id(run))
    assert stored.info.status == "FAILED"
    assert stored.info.end_time - stored.info.start_time < 2000


def test_a_submission_shows_the_key_figures_of_its_runs(home):
    tracker, parent = begin(home, "demo")
    for stage in (1, 2):
        _, run = begin(home, f"train-{stage}", parent=parent)
        change(run, parameters={"stage": stage})
        for step in (1, 2, 3):
            Journal(run).metrics(step, {"train/loss": stage / step, "train/lr": 0.1, "val/loss_ema": 1.0})
            tracker.sync(run)
    figures = [("train/stage_1_loss", 1), ("train/stage_2_loss", 2)]
    expected = {(key, step, stage / step) for key, stage in figures for step in (1, 2, 3)}
    points = stored_points(tracker, parent)
    assert expected <= set(points)
    assert {key for key, *_ in points} == {key for key, _ in figures} | {
        f"val/stage_{stage}_loss_ema" for stage in (1, 2)
    }
    assert len(points) == len(set(points))


def test_configuration_and_dataset_are_of_the_kind_that_mlflow_shows(home):
    tracker, run = begin(home, "a")
    dataset = home / "datasets/cats"
    dataset.mkdir(parents=True)
    data = dataclasses.asdict(demo(str(home)).data) | {"num_shards": 4}
    record = {"format": 4, "data": data, "models": {}, "images": 64, "rows_per_shard": 16, "hash": "a" * 64}
    record |= {"class_names": [], "latent_shape": [16, 8, 8], "text_dim": 8}
    (dataset / "manifest.json").write_text(json.dumps(record))
    configuration = {"data": {"source": "x" * 9000, "layers": [1, 2]}, "stage1": {"lr": 0.2}, "m" * 300: 1}
    configuration |= {"model": {f"key_{number}": number for number in range(150)}}
    (run / "config.json").write_text(json.dumps(configuration))
    add_tags(run, {"pixart.dataset": str(dataset)})
    tracker.sync(run)
    stored = tracker.client.get_run(run_id(run))
    assert stored.data.params.items() >= {"lr": "0.1", "stage1.lr": "0.2", "data.layers": "[1, 2]"}.items()
    assert (len(stored.data.params), len(stored.data.params["data.source"])) == (154, 6000)
    assert [file.path for file in tracker.client.list_artifacts(run_id(run))] == ["config.json"]
    (used,) = stored.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("cats", "a" * 36)
    assert json.loads(used.dataset.profile)["num_rows"] == 64
    assert [tag.value for tag in used.tags] == ["training"]
    experiment = tracker.client.get_experiment(tracker.experiment)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    (run / STATE).unlink()
    (run / "config.json").write_text('{"stage1": {"lr": 0.3}}')  # MLflow's parameters never change
    tracker.sync(run)
    assert tracker.client.get_run(run_id(run)).data.params["stage1.lr"] == "0.2"


def test_groups_of_metrics_have_mlflows_names(home):
    """The groups of MLflow's page are in alphabetical order, with its system metrics apart."""
    tracker, run = begin(home, "a")
    metrics = {"train/loss": 1.0, "fp8/headroom/blocks.0.input": 1.0, "val/loss": 1.0}
    metrics |= {f"system/node_{node}/cpu_utilization_percentage": 5.0 for node in (0, 1)}
    Journal(run).metrics(1, metrics)
    tracker.sync(run)
    assert sorted(tracker.client.get_run(run_id(run)).data.metrics) == [
        "system/cpu_utilization_percentage",
        "system/node_1/cpu_utilization_percentage",
        QUEUE,
        "train/fp8/headroom/input_min",
        "train/loss",
        "val/loss",
    ]


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
