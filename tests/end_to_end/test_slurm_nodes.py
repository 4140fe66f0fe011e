"""Faults of a single node and of the controller: a full disk, another time, a slow processor, no answer."""

import dataclasses
import os
import re
import shutil
import signal
import sys
import time
from datetime import datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.state import ledger, nodes
from jobs.state import run as runs
from slurm import commands
from slurm.sbatch import recorded
from slurm.task import attempts
from tests.end_to_end.test_slurm import (  # noqa: F401 - some are fixtures
    ALONE,
    IMAGES,
    PROFILE,
    SHARDS,
    SMALL,
    Bench,
    contents,
    failing_command,
    make_bench,
    newest,
    profile,
    small_data,
    submit,
    undisturbed,
    wait_for_end,
)
from tests.support.cluster_fixture import slurm, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
ON_FIRST_NODE = '[ "$SLURMD_NODENAME" = n1 ]'
NO_ANSWER_SECONDS = 60


def with_python(folder: Path, kind: str, script: str, text: str = PROFILE) -> Path:
    """Write a profile whose jobs of a kind run a shell script before Python; return its path."""
    python = folder / "python.sh"
    python.write_text(f'#!/bin/sh\n{script}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    path = folder / "nodes.toml"
    path.write_text(f'{text}\n[python]\n{kind} = "{python}"\n')
    return path


def test_a_controller_that_does_not_answer_for_a_minute_while_submitting(profile, tmp_path, dev_cluster, monkeypatch):  # noqa: F811
    """The controller stops as the first sbatch connects, and then accepts what it has received meanwhile."""
    controller = int((dev_cluster.folder / "slurmctld.pid").read_text())
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin/sbatch"
    sbatch.write_text(
        f"""#!/bin/sh
if [ ! -e {tmp_path}/stopped ]; then
  touch {tmp_path}/stopped
  kill -STOP {controller}
  (sleep {NO_ANSWER_SECONDS}; kill -CONT {controller}) >/dev/null 2>&1 &
fi
echo >> {tmp_path}/calls
exec {shutil.which("sbatch")} "$@"
"""
    )
    sbatch.chmod(0o755)
    begun = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
        words = ["caption", "--cluster", str(profile), "--dataset", str(tmp_path / "dataset"), *ALONE]
        try:
            submit(tmp_path, *words, settings={"data.num_shards": SHARDS, "data.max_images": IMAGES["caption"]})
        finally:
            os.kill(controller, signal.SIGCONT)
    assert time.monotonic() - begun > NO_ANSWER_SECONDS
    assert len((tmp_path / "calls").read_text()) > 1
    run = newest(tmp_path, "caption")
    assert len(run.job_ids) == 1
    logs = run.folder / "logs"
    wait_until(lambda: bool(attempts(run.folder)), description="a task")
    assert recorded(logs) == set(run.job_ids) <= commands.submitted_from(logs)  # also of elements that run
    assert set(wait_for_end(run).values()) == {"done"}
    assert sorted(line["arguments"] for line in attempts(run.folder)) == [[[shard]] for shard in range(SHARDS)]
    lines = [
        line.split("|") for line in slurm("squeue", "--noheader", "--states=all", "--format=%F|%T|%o").splitlines()
    ]
    unrecorded = [state for job, state, script in lines if Path(script).parent == logs and job not in run.job_ids]
    assert set(unrecorded) <= {"CANCELLED"}


def test_a_full_disk_on_one_node(dev_cluster, make_bench, undisturbed, tmp_path, capsys):  # noqa: F811
    """Shards fail there alone; `retry` avoids the node, although its disk is still full."""
    expected = undisturbed("caption")
    bench = make_bench("caption")
    captions = bench.dataset / "captions"
    mount = f"""if {ON_FIRST_NODE} && [ -z "$FULL" ]; then
  mkdir -p {captions}
  FULL=1 exec unshare --mount -- sh -c 'mount -t tmpfs -o size=16k tmpfs {captions} && exec "$0" "$@"' "$0" "$@"
fi"""
    exclusive_nodes = PROFILE.replace("cpus_per_task = 1", "cpus_per_task = 16")  # one task on each node
    bench = dataclasses.replace(bench, profile=with_python(tmp_path, "caption", mount, exclusive_nodes))
    run = bench.begin()
    states = wait_for_end(run)
    failed = [element for element in runs.elements(run).values() if element.state == "failed"]
    assert failed
    assert all("No space left on device" in element.note for element in failed), failed
    node_of = {line["job"]: line["node"] for line in attempts(run.folder)}
    assert {node_of[element.job] for element in failed} == {"n1"}
    assert ledger.shards(bench.dataset, "caption") == {shard for shard, state in states.items() if state == "done"}
    for _ in range(2):  # a node is avoided from its second failure on
        bench.retry(run)
        run = runs.load(run.folder)
        states = wait_for_end(run)
    assert set(states.values()) == {"done"}, runs.elements(run)
    assert "avoiding node n1: 2 tasks failed there, and none succeeded" in capsys.readouterr().err
    assert contents(bench, run) == expected
    assert not list(bench.dataset.rglob(".*"))


@pytest.mark.parametrize("offset", [-10, 10])
def test_a_node_with_another_time(dev_cluster, tmp_path, capsys, offset):
    """The tasks of one node have a clock that is ten minutes off: their shards, states and reports are as ever."""
    if not FAKETIME.exists():
        pytest.skip(f"needs {FAKETIME}, of the Debian package libfaketime")
    variables = f"LD_PRELOAD={FAKETIME} FAKETIME={offset:+}m FAKETIME_DONT_FAKE_MONOTONIC=1 NO_FAKE_STAT=1"
    path = with_python(tmp_path, "caption", f"if {ON_FIRST_NODE}; then export {variables}; fi")
    few = {"data.num_shards": 2, "data.max_images": 32}  # the library makes threads slow
    begun = time.time()
    submit(*(tmp_path, "caption", "--cluster", str(path), "--dataset", str(tmp_path / "dataset"), *ALONE), settings=few)
    run = newest(tmp_path, "caption")
    assert set(wait_for_end(run).values()) == {"done"}, runs.elements(run)
    started = [line["time"] for line in attempts(run.folder) if line["node"] == "n1"]
    difference = datetime.fromisoformat(started[0]).timestamp() - begun
    assert abs(difference - 60 * offset) < 300, "the clock of the node was not changed"
    submit(tmp_path, "caption", "--cluster", "local", "--dataset", str(tmp_path / "same"), settings=few)
    for shard in range(2):
        parts = [pq.read_table(tmp_path / name / f"captions/{shard:05d}.parquet") for name in ("dataset", "same")]
        assert parts[0].drop(["seconds"]).equals(parts[1].drop(["seconds"]))
    capsys.readouterr()
    submit(tmp_path, "status", run.folder.name)
    submit(tmp_path, "runs")
    assert not re.search(r"(?<![\w-])-[0-9]", capsys.readouterr().out)  # no negative duration or rate


def slow_down(folder: Path) -> str:
    """Return a command that lets the process that calls it compute for one millisecond of fifty."""
    script = folder / "slow_down.py"
    script.write_text(
        """import os, signal, sys, time
begun, process = time.monotonic(), int(sys.argv[1])
open(sys.argv[2], "w").close()
try:
    while time.monotonic() - begun < 8:
        os.kill(process, signal.SIGSTOP)
        time.sleep(0.049)
        os.kill(process, signal.SIGCONT)
        time.sleep(0.001)
except ProcessLookupError:
    pass
"""
    )
    begin = f"{sys.executable} {script} $PPID {folder}/begun > /dev/null 2>&1 < /dev/null &"
    return f"{begin} while [ ! -e {folder}/begun ]; do sleep 0.1; done;"


@pytest.fixture
def slow_node(tmp_path) -> str:
    """Text of a profile with which the first rank of node n2 becomes slow before its preflight measures it."""
    check = f"test $SLURMD_NODENAME != n2 || {{ {slow_down(tmp_path)} }}"
    return PROFILE.replace("signal_seconds", f"node_check = '{check}'\nsignal_seconds").replace("2000", "1000")


SHAPE = ("--gpus-per-node", "2", "--nodes", "2")


def test_a_slow_node_is_avoided(dev_cluster, make_bench, undisturbed, slow_node, tmp_path, capsys):  # noqa: F811
    """The preflight names it, and the job trains on the others with the same number of ranks, bit for bit as ever."""
    expected = undisturbed("train")
    slow = tmp_path / "slow.toml"
    slow.write_text(slow_node)
    bench = dataclasses.replace(make_bench("train"), profile=slow)
    submit(
        *(bench.home, "train", "--cluster", str(slow), "--dataset", str(bench.dataset), *SHAPE),
        settings=SMALL,
    )
    run = newest(bench.home, "train")
    assert wait_for_end(run) == {0: "done"}, runs.elements(run)
    starts = attempts(run.folder)
    assert {line["node"] for line in starts if line["restart"] == 0} == {"n1", "n2"}
    again = {line["node"] for line in starts if line["restart"] == 1}  # Slurm takes n1 if it is free by then
    assert (len(again), "n2" in again, set(nodes.excluded(run.folder))) == (2, False, {"n2"})
    assert contents(bench, run) == expected
    capsys.readouterr()
    submit(bench.home, "status", run.folder.name)
    assert re.search(r"avoids node n2: a matrix product takes [0-9.]+ times the median", capsys.readouterr().out)


def test_a_site_that_forbids_changes_of_nodes(dev_cluster, make_bench, undisturbed, tmp_path, capsys):  # noqa: F811
    """The job ends as cancelled in place of starting on the bad node again, and `retry` submits it without the node."""
    expected = undisturbed("train")
    denied = "slurm_update error: Access/permission denied"
    forbidding = failing_command(tmp_path, "scontrol", "-ge 1", denied)  # the requeue is the first call
    check = "test $SLURMD_NODENAME != n1 || { echo 'the GPU fell off the bus'; exit 1; }"
    text = PROFILE.replace("signal_seconds", f'node_check = "{check}"\nsignal_seconds')
    text = text.replace("[environment]", f'[environment]\nPATH = "{forbidding}:{os.environ["PATH"]}"')
    path = tmp_path / "forbidding.toml"
    path.write_text(text)
    bench = dataclasses.replace(make_bench("train"), profile=path)
    submit(
        *(bench.home, "train", "--cluster", str(path), "--dataset", str(bench.dataset), *SHAPE),
        settings=SMALL,
    )
    run = newest(bench.home, "train")
    assert wait_for_end(run) == {0: "cancelled"}
    assert nodes.excluded(run.folder) == {"n1": "the GPU fell off the bus"}
    assert any(denied in log.read_text() for log in run.logs(run.job_ids[0], "err"))
    capsys.readouterr()
    bench.retry(run)
    assert "avoiding node n1: the GPU fell off the bus" in capsys.readouterr().err
    run = runs.load(run.folder)
    assert wait_for_end(run) == {0: "done"}, runs.elements(run)
    assert {line["node"] for line in attempts(run.folder) if line["job"] == run.job_ids[-1]} == {"n2", "n3"}
    assert contents(bench, run) == expected
