"""Synchronization of runs: shard metrics from the ledger, final status, node metrics and pages."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from PIL import Image

from jobs.reports.run_pages import LINEAGE, SUMMARY, main_page, write_pages
from jobs.state import ledger
from jobs.state import run as runs
from jobs.state.journal import Journal, points, read_journal
from jobs.state.run import Run
from jobs.state.run_metadata import change, describe, read_description, set_status
from jobs.tracking import node_agent
from jobs.tracking.mlflow_store import Tracker, run_id
from jobs.tracking.sync import journal_shards, set_final_status, sync_folder, update_folder
from slurm.executor import Cluster
from slurm.profile import load
from slurm.sbatch import Shape
from slurm.task import ATTEMPTS
from tests.conversion.report.test_html import marks, plots, read

ROOT = Path(__file__).parents[3]
SYSTEM_METRICS = ("cpu_utilization_percentage", "system_memory_usage_megabytes", "disk_available_megabytes")


def make_run(home: Path, kind: str, **values) -> Run:
    """Create a run folder with metadata."""
    folder = home / "runs" / f"20260101-000000-{kind}-abcd"
    folder.mkdir(parents=True)
    values = {"dataset": str(home / "data"), "executor": "local", "total": 1, **values}
    run = Run(folder=folder, kind=kind, **values)
    run.save()
    describe(folder, {"steps": 100, "lr": 0.1}, {"pixart.commit": "abc"})
    return run


def record(run: Run, shard: int, rows: int) -> None:
    """Record a finished shard in the ledger; one of its rows is invalid."""
    entry = ledger.Entry(manifest="m", inputs="", rows=rows, valid=rows - 1, checksum="c", seconds=2.0, versions={})
    ledger.record(run.dataset, run.kind, shard, entry)


def test_shard_metrics_are_logged_once(tmp_path):
    run = make_run(tmp_path, "caption", elements=(0, 1, 2), total=3)
    record(run, 2, 10)
    record(run, 7, 10)  # a shard of another run
    journal_shards(run)
    record(run, 0, 20)
    with (run.folder / "journal/shards.jsonl").open("a") as file:
        file.write('{"time": 1, "st')  # the writer was killed
    for _ in range(2):
        journal_shards(run)
    logged = sorted((key, step, value) for key, value, _, step in points(read_journal(run.folder)[0], set()))
    rates = [("data/images_per_second", 0, 10.0), ("data/images_per_second", 2, 5.0)]
    assert [point for point in logged if point[0] == rates[0][0]] == rates
    assert [point[1:] for point in logged if point[0] == "data/num_valid"] == [(0, 19.0), (2, 9.0)]
    assert len(logged) == 8


def test_every_run_gets_a_final_status(tmp_path):
    """A run has its final status, whatever happened to the launcher and the tasks."""
    run = make_run(tmp_path, "caption", elements=(0, 1), total=2, jobs=(("999999991", (0, 1)),))
    set_final_status(run, runs.elements(run))
    assert read_description(run.folder)["status"] == "FAILED"
    for shard in (0, 1):
        record(run, shard, 5)
    set_final_status(run, runs.elements(run))
    assert read_description(run.folder)["status"] == "FINISHED"


def work(run: str, *, fail: bool) -> str:
    Journal(run).metrics(1, {"train/loss": 1.0})
    if fail:
        raise ValueError("no such thing")
    return "result"


@pytest.mark.slow
@pytest.mark.parametrize("fail", [False, True])
def test_rank_runs_with_a_node_agent(tmp_path, monkeypatch, fail):
    """The metrics of the node are recorded, and the rank records its final status."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = make_run(tmp_path, "train", nodes=1)
    cluster = Cluster(load("local"), run.folder)
    function = functools.partial(node_agent.with_node_agent, work, str(run.folder), fail=fail)
    run = run.added([cluster.submit_ranks(Shape(kind="train"), function)])
    while runs.is_active(elements := runs.elements(run)):
        time.sleep(0.1)
    assert elements[0].state == ("failed" if fail else "done"), elements
    assert read_description(run.folder)["status"] == ("FAILED" if fail else "FINISHED")
    keys = {key for key, *_ in points(read_journal(run.folder)[0], set())}
    assert {"train/loss", *(f"system/node_0/{name}" for name in SYSTEM_METRICS)} <= keys


def test_node_agent_ends_with_a_killed_rank(tmp_path):
    run = make_run(tmp_path, "train", nodes=1)
    code = (
        "import subprocess, sys, time\n"
        "words = [sys.executable, '-m', 'jobs.tracking.node_agent', sys.argv[1], '0']\n"
        "child = subprocess.Popen(words, stdin=subprocess.PIPE)\n"
        "print(child.pid, flush=True)\ntime.sleep(600)\n"
    )
    words = [sys.executable, "-c", code, str(run.folder)]
    rank = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert rank.stdout
    child = int(rank.stdout.readline())
    os.kill(rank.pid, signal.SIGKILL)
    rank.wait()
    deadline = time.monotonic() + 20
    while Path(f"/proc/{child}/cmdline").exists() and Path(f"/proc/{child}/cmdline").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def make_training(home: Path, steps: int) -> Run:
    """Create a training run whose journal has metrics of every step."""
    run = make_run(home, "train", nodes=2, total=steps)
    journal = Journal(run.folder)
    for step in range(1, steps + 1):
        journal.metrics(step, {"train/loss": 1 / step, "train/grad_norm": 10.0 ** (-step % 5), "train/lr": 1e-4})
    return run


def test_a_summary_of_a_long_run_with_faults(tmp_path):
    run = make_training(tmp_path, 5000)
    journal = Journal(run.folder)
    journal.metrics(5001, {"train/loss": float("nan")})
    journal.incident(17, "left out: <the gradient> is nan")
    (run.folder / "previews").mkdir()
    for step in range(0, 2000, 100):
        Image.new("RGB", (64, 32)).save(run.folder / f"previews/step-{step:08d}.png")
    starts = [("1", 0, "10:00:00"), ("1", 1, "11:00:00"), ("2", 0, "12:00:00")]
    lines = [
        {"job": job, "rank": 0, "restart": restart, "arguments": [], "node": "n1", "time": f"2026-01-01T{clock}"}
        for job, restart, clock in starts
    ]
    (run.folder / ATTEMPTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_pages(run)
    html = (run.folder / SUMMARY).read_text()
    page = read(html)
    words = " ".join(page.text)
    for description in ("<the gradient> is nan", "requeued, attempt 2, on n1", "submitted again as job 2, on n1"):
        assert description in words, description
    assert page.tags.isdisjoint({"script", "link", "iframe", "object"})
    assert html.count("<img ") == html.count('src="data:image/jpeg') == 12
    drawn = plots(html)
    assert len(drawn) == 3
    assert all(0 < len(marks(svg)) < 1000 for svg in drawn)
    assert html.count('class="event"') == 3  # the one incident with a step, in each plot


def test_unchanged_pages_are_not_written_again(tmp_path):
    """An unchanged page is neither written nor sent to MLflow again."""
    run = make_training(tmp_path, 3)
    update_folder(run)
    assert not (run.folder / SUMMARY).exists()
    for _ in range(2):
        update_folder(run, pages=True)
    artifacts = [line["artifact"] for line in read_journal(run.folder)[0] if "artifact" in line]
    assert artifacts == [str(run.folder / SUMMARY), str(run.folder / LINEAGE)]
    set_status(run.folder, "FINISHED")
    update_folder(run)
    assert len([line for line in read_journal(run.folder)[0] if "artifact" in line]) == 3
    assert main_page(run) == run.folder / SUMMARY
    empty = make_run(tmp_path / "other", "train")
    update_folder(empty, pages=True)
    assert "No step has been logged" in (empty.folder / SUMMARY).read_text()
    assert main_page(make_run(tmp_path, "verify")).name == LINEAGE


def test_a_summary_has_the_times_of_the_work_and_links_to_its_results(tmp_path):
    run = make_training(tmp_path, 1)
    begun = datetime(2026, 1, 1, 10, tzinfo=timezone(timedelta(hours=2)))
    line = {"job": "1", "rank": 0, "restart": 0, "arguments": [], "node": "n1", "time": begun.isoformat()}
    (run.folder / ATTEMPTS).write_text(json.dumps(line) + "\n")
    (run.folder / "profile.json").write_text('{"gpus_per_node": 1}')
    change(run.folder, begun=begun.timestamp() - 65)
    set_status(run.folder, "FINISHED", begun.timestamp() + 2 * 3600)
    checkpoint = run.folder / "checkpoints/step-00000001"
    checkpoint.mkdir(parents=True)
    (checkpoint / "training.json").write_text("{}")
    write_pages(run)
    html = (run.folder / SUMMARY).read_text()
    words = " ".join(read(html).text)
    zone = datetime.fromtimestamp(begun.timestamp()).astimezone().tzname()
    for fact in ("after 0 h 01 min in the queue", "2 h 00 min", "4.00 on 2 GPUs", str(zone)):
        assert fact in words, fact
    assert 'href="lineage.html"' in html
    assert 'href="checkpoints/step-00000001/training.json"' in html
    ticks = re.findall('<text x="[^"]*" y="266[^"]*" text-anchor="middle">([^<]*)<', html)
    assert ticks[0] == "0"  # one point at step 1: the axis begins at 0, not at the point
    assert "<summary>Values</summary>" in html


@pytest.mark.slow
def test_nodes_synchronize_with_a_reachable_server(tmp_path, monkeypatch, mlflow_server):
    """No launcher waits: a rank's node agent syncs, and of the elements of an array one per minute."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    training = make_run(tmp_path, "train", nodes=1)
    function = functools.partial(node_agent.with_node_agent, work, str(training.folder), fail=False)
    job = Cluster(load("local"), training.folder).submit_ranks(Shape(kind="train"), function)
    training = training.added([job])
    while runs.is_active(runs.elements(training)):
        time.sleep(0.1)
    captions = make_run(tmp_path, "caption", elements=(0, 1), total=2)
    for shard in (0, 1):
        node_agent.with_sync(functools.partial(record, captions, shard), str(captions.folder), 10 + shard)
    tracker = Tracker(tmp_path)
    stored = tracker.client.get_run(run_id(training.folder))
    assert stored.info.status == "FINISHED"
    assert stored.data.metrics["train/loss"] == 1.0
    images = tracker.client.get_metric_history(run_id(captions.folder), "data/images")
    assert [(point.step, point.value) for point in images] == [(0, 10.0)]  # the second is sent with the next sync
    sync_folder(tracker, captions.folder)
    stored = tracker.client.get_run(run_id(captions.folder))
    assert (stored.info.status, stored.data.metrics["data/images"]) == ("FINISHED", 11.0)


@pytest.mark.slow
def test_256_elements_synchronize_with_a_server_at_once(tmp_path, monkeypatch, mlflow_server):
    """No element fails or waits for another; points after the element's last read are sent with the next sync."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    run = make_run(tmp_path, "caption", elements=tuple(range(256)), total=256)
    barrier, opener = os.pipe()
    children = []
    for shard in range(256):
        if child := os.fork():
            children.append(child)
            continue
        try:
            os.close(opener)
            os.read(barrier, 1)  # blocks until the parent closes the other end
            node_agent.with_sync(functools.partial(record, run, shard), str(run.folder), 10 + shard)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(opener)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 256
    tracker = Tracker(tmp_path)
    assert tracker.client.get_metric_history(run_id(run.folder), "data/images")
    sync_folder(tracker, run.folder)
    images = tracker.client.get_metric_history(run_id(run.folder), "data/images")
    assert sorted((point.step, point.value) for point in images) == [(shard, 10.0 + shard) for shard in range(256)]
    assert tracker.client.get_run(run_id(run.folder)).info.status == "FINISHED"
