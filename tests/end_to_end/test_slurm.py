"""Jobs on a real Slurm: documented commands, the environment of ranks, retry, status, and every kind of fault."""

import dataclasses
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from jobs import launch
from jobs.state import ledger
from jobs.state import run as runs
from jobs.state.run import Element, Run
from jobs.submission.wait import poll
from jobs.tracking.mlflow_store import read_journal
from pixart.checkpoint import directory as checkpoints
from pixart.data import manifest as manifests
from pixart.data.store.zarr_store import Store
from slurm import commands
from slurm.devcluster import lifecycle
from slurm.devcluster.cluster import DevCluster
from slurm.devcluster.files import SPOT, URGENT
from slurm.task import ATTEMPTS, attempts
from tests.support.cluster_fixture import accepted, has_pending_signal, slurm, task_processes, wait_until
from tests.support.recovery_times import RECOVERY

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SHARDS = 4
PROFILE = """
executor = "slurm"
partition = "main"
gpus_per_node = 1
cpus_per_task = 1
max_slowdown_percent = 2000  # the nodes share the processors of this machine
signal_seconds = 45

[environment]
OMP_NUM_THREADS = "1"
MASTER_ADDR = "127.0.0.1"

[minutes]
caption = 30
latents = 30
train = 30
"""
SMALL = {
    "data.num_shards": SHARDS,
    "model.dim": 32,
    "model.cond_dim": 32,
    "model.num_heads": 2,
    "model.num_blocks": 2,
    "stage1.steps": 60,
    "stage1.global_batch_size": 8,
    "stage1.warmup_steps": 4,
    "stage1.save_every": 20,
    "stage1.log_every": 1,
}
IMAGES = {"caption": 8000, "latents": 1600, "train": 64}
ALONE = ("--per-task", "1")  # each shard in a task of its own


@pytest.fixture(scope="module")
def profile(dev_cluster: DevCluster, tmp_path_factory) -> Path:
    """Path of a cluster profile for the development cluster."""
    path = tmp_path_factory.mktemp("profile") / "small.toml"
    path.write_text(PROFILE)
    return path


def submit(home: Path, *words: str, settings: dict | None = None, code: int = 0) -> None:
    """Call the launcher and assert its exit code."""
    overrides = [word for key, value in (settings or {}).items() for word in ("--set", f"{key}={value}")]
    assert launch.main([*words, "--home", str(home), *overrides]) == code


def newest(home: Path, kind: str) -> Run:
    """Return the newest run of a kind."""
    return runs.load(sorted(path for path in (home / "runs").iterdir() if f"-{kind}-" in path.name)[-1])


def wait_for_end(run: Run, seconds: float = 600) -> dict[int, str]:
    """Wait for the end of a run and return the state of each element."""

    def ended() -> bool:
        return not runs.is_active(runs.elements(run))

    wait_until(ended, seconds, f"the end of {run.folder.name}", interval=0.5)
    return {number: element.state for number, element in runs.elements(run).items()}


# Documented commands


def test_the_commands_as_written(dev_cluster, tmp_path, monkeypatch):
    """The shipped profile `dev` runs 256 elements, then four nodes with one and with two ranks each."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PIXART_HOME", raising=False)
    home = tmp_path / "outputs"
    assert launch.main(["caption", "--array", "0-255"]) == 0
    run = newest(home, "caption")
    assert [len(shards) for _, shards in run.jobs] == [64] * 4  # shards of 16 images share a task
    assert sorted(shard for _, shards in run.jobs for shard in shards) == list(range(256))
    assert set(wait_for_end(run, 900).values()) == {"done"}
    assert ledger.shards(home / "datasets/demo", "caption") == set(range(256))
    assert sorted(shard for line in attempts(run.folder) for shard in line["arguments"][0]) == list(range(256))

    assert launch.main(["latents", "--cluster", "local"]) == 0
    assert launch.main(["train", "--nodes", "4"]) == 0
    run = newest(home, "train")
    wait_until(lambda: runs.progress(run)[0] >= 20, description="step 20 of 300")
    check_ranks(run, per_node=1)
    assert launch.main(["cancel"]) == 0
    assert wait_for_end(run) == {0: "cancelled"}

    submit(home, "train", "--nodes", "4", "--gpus-per-node", "2", settings={"stage1.steps": 10})
    run = newest(home, "train")
    assert wait_for_end(run, 900) == {0: "done"}, runs.elements(run)
    assert runs.progress(run)[0] == 10
    check_ranks(run, per_node=2)


def check_ranks(run: Run, *, per_node: int) -> None:
    """Assert that the ranks of four nodes are on their nodes, in one group with one master."""
    nodes = {line["rank"]: line["node"] for line in attempts(run.folder)}
    assert nodes == {rank: f"n{rank // per_node + 1}" for rank in range(4 * per_node)}
    printed = [log.read_text() for log in run.logs(run.job_ids[0], "out")]
    words = [
        re.search(r"rank ([0-9]+) of ([0-9]+), local rank ([0-9]+) of ([0-9]+), master (.*)", log) for log in printed
    ]
    matches = [tuple(int(number) for number in match.groups()[:4]) for match in words]
    assert matches == [(rank, 4 * per_node, rank % per_node, per_node) for rank in range(4 * per_node)]
    assert len({match[5] for match in words}) == 1


def test_an_array_beyond_the_largest_is_submitted_in_parts(profile, tmp_path, monkeypatch, capsys):
    """Parts run in sequence, so that no more elements run at once than requested; elements keep their shards.

    With `--wait`, the command returns after the last part.
    """
    monkeypatch.setattr("slurm.limits.max_array_size", lambda: 2)
    submit(
        *(tmp_path, "caption", "--cluster", str(profile), "--array", "1,3,4,6,7%1", *ALONE, "--wait"),
        settings={"data.num_shards": 8, "data.max_images": 64},
    )
    run = newest(tmp_path, "caption")
    assert len(run.job_ids) == 3
    assert {number: element.state for number, element in runs.elements(run).items()} == dict.fromkeys(
        (1, 3, 4, 6, 7), "done"
    )
    printed = capsys.readouterr().out
    assert "caption: begun\n" in printed
    assert "caption: done in" in printed
    assert "caption: 5 shards, 40 of 40 images valid" in printed
    starts = attempts(run.folder)
    assert [(line["job"], line["arguments"]) for line in starts] == [
        (job, [list(elements)]) for job, elements in run.jobs
    ]


def test_dry_run_prints_the_later_submission_which_runs_a_code_snapshot(profile, tmp_path, capsys):
    words, settings = (
        ("caption", "--cluster", str(profile), "--array", "0,2", *ALONE),
        {"data.num_shards": 4, "data.max_images": 16_000},
    )
    submit(tmp_path, *words, "--dry-run", settings=settings)
    printed = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    submit(tmp_path, *words, settings=settings)
    run = newest(tmp_path, "caption")
    files = {name: (run.folder / name).read_text() for name in ("sbatch.txt", "config.json", "profile.json", "git.txt")}
    script, forecast = printed.split("\n# caption start: ", 1)
    assert (
        script.replace("runs/RUN", f"runs/{run.folder.name}") + "\n" == f"{files['sbatch.txt']}\n{files['config.json']}"
    )
    start, hours, size = forecast.splitlines()
    assert re.fullmatch(r"would start at \S+ on n\S+", start)
    assert (hours, size) == ("# caption GPU hours: 1.0 at most", "# caption writes: less than 0.001 TB")
    job = run.job_of()[0]
    wait_until(lambda: bool(task_processes(job)), description="a task")
    (copy,) = {Path(f"/proc/{pid}/cwd").resolve() for pid in task_processes(job)}
    assert copy == run.folder / "code-1"
    assert (copy / "jobs/launch.py").read_text() == Path(launch.__file__).read_text()
    assert set(wait_for_end(run).values()) == {"done"}


PIPELINE = SMALL | {
    "data.max_images": 64,
    "stage1.steps": 6,
    "stage2.steps": 6,
    "stage2.global_batch_size": 8,
    "stage2.warmup_steps": 2,
    "sample.count": 2,
    "sample.steps": 2,
}


def test_pipeline_from_scenes_to_a_picture(profile, tmp_path, capsys):
    """One command submits all jobs; each starts after those before it have succeeded."""
    submit(tmp_path, "pipeline", "--cluster", str(profile), settings=PIPELINE)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[-4:]] == [
        "train",
        "convert",
        "train",
        "sample",
    ]
    last = newest(tmp_path, "sample")
    assert wait_for_end(last, 600) == {0: "done"}
    assert (last.folder / "samples.png").exists()
    started = sorted((path.parent for path in tmp_path.glob("runs/*/attempts.jsonl")), key=first_start)
    kinds = [folder.name.split("-")[2] for folder in started]
    assert kinds == ["caption", "latents", "audit", "train", "convert", "train", "sample"]


def test_pipeline_stops_at_a_failed_element(profile, tmp_path):
    """Nothing is computed from an incomplete dataset: the jobs that follow are cancelled before they start."""
    settings = {"data.num_shards": SHARDS, "data.max_images": 64}
    submit(tmp_path, "init", "--cluster", str(profile), settings=settings)
    (tmp_path / "datasets/demo/captions/00003.parquet").mkdir(parents=True)  # blocks the output file of the element
    submit(tmp_path, "pipeline", "--cluster", str(profile), settings=settings)
    assert wait_for_end(newest(tmp_path, "caption")) == {0: "done", 1: "done", 2: "done", 3: "failed"}
    assert set(wait_for_end(newest(tmp_path, "latents")).values()) == {"cancelled"}
    assert wait_for_end(newest(tmp_path, "sample")) == {0: "cancelled"}
    assert [path.parent.name.split("-")[2] for path in tmp_path.glob("runs/*/attempts.jsonl")] == ["caption"]


def first_start(folder: Path) -> str:
    return attempts(folder)[0]["time"]


def test_retry_never_trains_on_half_a_dataset(profile, tmp_path, capsys):
    """Training is chained to latents, and latents are cancelled: a retry of training is refused, then chained again."""
    words = ["--cluster", str(profile), "--dataset", str(tmp_path / "dataset")]
    submit(tmp_path, "caption", *words, "--wait", settings={"data.num_shards": SHARDS, "data.max_images": 640})
    slurm("scontrol", "update", "partition=main", "state=down")  # accepts jobs and starts none
    try:
        submit(tmp_path, "train", *words, settings={key: SMALL[key] for key in SMALL if key[:4] != "data"})
        submit(tmp_path, "cancel", newest(tmp_path, "latents").folder.name)
        train, latents = newest(tmp_path, "train"), newest(tmp_path, "latents")
        assert set(wait_for_end(latents).values()) == {"cancelled"}
    finally:
        slurm("scontrol", "update", "partition=main", "state=up")
    assert wait_for_end(train) == {0: "cancelled"}  # its dependency can never be fulfilled

    capsys.readouterr()
    submit(tmp_path, "retry", train.folder.name, code=2)
    error = capsys.readouterr().err
    assert "needs" in error
    assert "retry" in error
    assert len(runs.load(train.folder).jobs) == len(train.jobs)

    submit(tmp_path, "retry", latents.folder.name)
    assert set(wait_for_end(runs.load(latents.folder)).values()) == {"done"}
    audit = newest(tmp_path, "audit")
    if set(wait_for_end(audit).values()) != {"done"}:
        submit(tmp_path, "retry", audit.folder.name)
        assert wait_for_end(runs.load(audit.folder)) == {0: "done"}
    submit(tmp_path, "retry", train.folder.name)
    assert wait_for_end(runs.load(train.folder)) == {0: "done"}


def failing_command(folder: Path, name: str, condition: str, message: str) -> Path:
    """Write a Slurm command that fails with a message in the calls whose number, from 0, meets a condition of `test`.

    Returns the folder of the command, for PATH. The number of calls is in `folder / "count"`.
    """
    (folder / "bin").mkdir()
    script = folder / "bin" / name
    script.write_text(
        f"""#!/bin/sh
count=$(cat {folder}/count 2>/dev/null || echo 0)
echo $((count + 1)) > {folder}/count
if [ "$count" {condition} ]; then echo '{message}' >&2; exit 1; fi
exec {shutil.which(name)} "$@"
"""
    )
    script.chmod(0o755)
    return folder / "bin"


def test_the_third_part_of_an_array_is_refused(profile, tmp_path, capsys, monkeypatch, dev_cluster):
    """What was accepted is recorded and runs; `retry` submits the others."""
    limited = failing_command(tmp_path, "sbatch", "-ge 2", "sbatch: error: QOSMaxSubmitJobPerUserLimit")
    monkeypatch.setattr("slurm.limits.max_array_size", lambda: 2)
    words = ["caption", "--cluster", str(profile), "--dataset", str(tmp_path / "dataset"), *ALONE]
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{limited}:{os.environ['PATH']}")
        submit(tmp_path, *words, settings={"data.num_shards": 6, "data.max_images": 48}, code=2)
    error = capsys.readouterr().err
    assert "QOSMaxSubmitJobPerUserLimit; 4 of 6 shards were submitted before" in error
    run = newest(tmp_path, "caption")
    assert wait_for_end(run) == {**dict.fromkeys(range(4), "done"), 4: "failed", 5: "failed"}
    submit(tmp_path, "retry", run.folder.name)
    assert set(wait_for_end(runs.load(run.folder)).values()) == {"done"}


def test_a_launcher_within_a_job_with_memory_per_processor(tmp_path, dev_cluster):
    """The variables of the outer job do not reach the inner one, whose profile has a memory per node."""
    profile = tmp_path / "memory.toml"
    profile.write_text(PROFILE.replace('partition = "main"', 'partition = "main,urgent"\nmemory_gb = 1'))
    words = [sys.executable, "-m", "jobs.launch", "caption", "--cluster", str(profile), "--home", str(tmp_path)]
    words += ["--set", "data.num_shards=2", "--set", "data.max_images=16"]
    outer = ["srun", "--nodes=1", "--ntasks=1", "--mem-per-cpu=300", "--time=5", *words]
    done = subprocess.run(outer, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert set(wait_for_end(newest(tmp_path, "caption")).values()) == {"done"}


def test_a_controller_that_does_not_answer_ends_no_wait(profile, tmp_path, monkeypatch, capsys, dev_cluster):
    """Three queries in a row fail while the launcher waits."""
    timed_out = "slurm_load_jobs error: Socket timed out on send/recv operation"
    broken = failing_command(tmp_path, "squeue", "-lt 3", timed_out)
    fast = tmp_path / "fast.toml"
    fast.write_text(PROFILE.replace("cpus_per_task", "poll_seconds = 1\ncpus_per_task"))
    monkeypatch.setenv("PATH", f"{broken}:{os.environ['PATH']}")
    words = ["caption", "--cluster", str(fast), "--dataset", str(tmp_path / "dataset"), "--wait"]
    submit(tmp_path, *words, settings={"data.num_shards": 2, "data.max_images": IMAGES["caption"]})
    assert capsys.readouterr().err.count("Socket timed out") == 1
    assert int((tmp_path / "count").read_text()) >= 3


def test_a_result_that_becomes_visible_after_its_job_has_completed(profile, tmp_path):
    """A shared file system shows the ledger entry a second later: until then the shard counts as running."""
    words = ["caption", "--cluster", str(profile), "--dataset", str(tmp_path / "dataset")]
    submit(tmp_path, *words, settings={"data.num_shards": 1, "data.max_images": 8})
    run = newest(tmp_path, "caption")
    assert wait_for_end(run) == {0: "done"}
    wait_until(lambda: commands.states("slurm", [run.job_of()[0]])[run.job_of()[0]].ended, description="COMPLETED")
    entry = ledger.path(tmp_path / "dataset", "caption", 0)
    entry.rename(tmp_path / "entry")
    polled = [elements[0] for elements in poll_until(run, lambda: (tmp_path / "entry").rename(entry))]
    assert [element.state for element in polled] == ["running", "running", "done"]
    assert polled[0].note == "completed; its result is not visible yet"


def poll_until(run: Run, appear: Callable[[], object]) -> Iterator[dict[int, Element]]:
    """Yield the states that a waiting launcher sees; `appear` is called after the first two."""
    for number, elements in enumerate(poll(run, 0.5)):
        yield elements
        if number == 1:
            appear()


def test_doctor_queries_slurm_for_every_kind_of_job(dev_cluster, tmp_path, capsys):
    """The nodes have no real GPU, so that the build of torch is the only thing that may be missing."""
    launch.main(["doctor", "--home", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    starts = [line for line in lines if line.startswith("ok ") and "would start at" in line]
    assert [re.split("[:,] ", line)[1] for line in starts] == [
        "caption",
        "latents",
        "audit",
        "train",
        "convert",
        "sample",
    ]
    assert all(line.split()[1] == "CUDA:" for line in lines if line.startswith("missing"))
    profile = tmp_path / "odd.toml"
    profile.write_text(PROFILE.replace('partition = "main"', 'partition = "main"\nreservation = "nothing"'))
    assert launch.main(["doctor", "--home", str(tmp_path), "--cluster", str(profile)]) == 2
    refused = [line for line in capsys.readouterr().out.splitlines() if line.startswith("missing  Slurm")]
    assert len(refused) == 6
    assert "reservation" in refused[0]


# Faults


@dataclass(frozen=True)
class Bench:
    """Setup of a fault test: a kind of job, and the home, profile and dataset that it runs with."""

    kind: str
    home: Path
    profile: Path
    dataset: Path

    def begin(self) -> Run:
        """Submit the job and return its run."""
        words = [self.kind, "--cluster", str(self.profile), "--dataset", str(self.dataset)]
        settings = {"train": SMALL, "caption": {"data.num_shards": SHARDS, "data.max_images": IMAGES["caption"]}}
        shape = ["--nodes", "4"] if self.kind == "train" else ALONE
        submit(self.home, *words, *shape, settings=settings.get(self.kind))
        return newest(self.home, self.kind)

    def retry(self, run: Run) -> None:
        submit(self.home, "retry", run.folder.name)


def wait_for_active_job(run: Run) -> str:
    """Wait until the work itself has started, not only its imports, and return the job ID."""
    job = run.jobs[-1][0]
    if run.kind == "train":
        wait_until(lambda: runs.progress(run)[0] >= 25, description="step 25")
        return job
    wait_until(lambda: any(line["job"] == job for line in attempts(run.folder)), description="the first task")
    time.sleep(1.5 if run.kind == "caption" else 4)  # some seconds of the work of its shard
    return job


def kill_a_task(bench: Bench, run: Run, job: str, cluster: DevCluster) -> None:
    os.kill(task_processes(job)[-1], signal.SIGKILL)
    wait_for_end(run)
    bench.retry(run)


def requeue(bench: Bench, run: Run, job: str, cluster: DevCluster) -> None:
    slurm("scontrol", "requeue", job)


def node_down(bench: Bench, run: Run, job: str, cluster: DevCluster) -> None:
    """Mark a node as down in Slurm only: its tasks run on until it is back, in parallel to their restart."""
    node = attempts(run.folder)[-1]["node"]
    slurm("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    wait_until(lambda: node_is_up(node) or accepted("scontrol", "update", f"nodename={node}", "state=resume"))


def node_is_up(node: str) -> bool:
    return slurm("sinfo", "--noheader", "-n", node, "-o", "%t").split()[0] in ("idle", "mix", "alloc", "comp")


def time_limit(bench: Bench, run: Run, job: str, cluster: DevCluster) -> None:
    """Stop the task's processes until Slurm has sent the signal that precedes the time limit."""
    slurm("scontrol", "update", f"jobid={job}", "timelimit=1")
    pids = task_processes(job)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: all(has_pending_signal(pid, signal.SIGUSR2) for pid in pids), 90, "the signal")
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    # The restart needs more time.
    wait_until(lambda: accepted("scontrol", "update", f"jobid={job}", "timelimit=30"))


def preempt(bench: Bench, run: Run, job: str, cluster: DevCluster) -> None:
    slurm("sbatch", "-p", URGENT, "-N4", "--exclusive", "--wait", "-o", "/dev/null", "--wrap", "sleep 1")


def cancel(bench: Bench, run: Run, job: str, cluster: DevCluster) -> None:
    submit(bench.home, "cancel", run.folder.name)
    assert "cancelled" in wait_for_end(run).values()
    bench.retry(run)


def restart_controller(bench: Bench, run: Run, job: str, cluster: DevCluster) -> None:
    """Restart the controller once it has saved that the job runs, which it does every few seconds.

    The controller loses what it has not saved: if the job was saved as pending, it ends the running tasks and may hold
    the job.
    """
    begun = (run.folder / ATTEMPTS).stat().st_mtime
    wait_until(lambda: (cluster.folder / "state/job_state").stat().st_mtime > begun, description="a saved state")
    cluster.restart_controller()


FAULTS = (kill_a_task, requeue, node_down, time_limit, preempt, cancel, restart_controller)


@pytest.fixture(scope="module")
def small_data(tmp_path_factory) -> Callable[[str], Path]:
    """Callable that returns, for a kind of job, a dataset that lacks only the output of that job."""
    home = tmp_path_factory.mktemp("data")

    @functools.cache
    def make(kind: str) -> Path:
        for job in {"caption": [], "latents": ["caption"], "train": ["caption", "latents", "audit"]}[kind]:
            settings = {"data.num_shards": SHARDS, "data.max_images": IMAGES[kind]} if job == "caption" else {}
            submit(home, job, "--cluster", "local", "--dataset", str(home / kind), settings=settings)
        return home / kind

    return make


def contents(bench: Bench, run: Run) -> dict[str, object]:
    """Return all outputs of a run in a form that is compared bit for bit."""
    if bench.kind == "caption":
        parts = [bench.dataset / f"captions/{shard:05d}.parquet" for shard in range(SHARDS)]
        return {part.name: pq.read_table(part).drop(["seconds"]).to_pydict() for part in parts}
    if bench.kind == "latents":
        store = Store(manifests.read(bench.dataset))
        rows = np.arange(IMAGES["latents"])
        return {name: store.read(name, rows).tobytes() for name in store.arrays}
    saved = checkpoints.load(runs.result(run))
    tensors = {
        f"{field}.{name}": tensor.numpy().tobytes()
        for field in ("model", "ema", "optimizer", "scales")
        for name, tensor in getattr(saved, field).items()
    }
    losses = {
        line["step"]: line["metrics"]["train/loss"]
        for line in read_journal(run.folder)[0]
        if "train/loss" in line.get("metrics", {})
    }
    return {**tensors, "losses": losses}


@pytest.fixture(scope="module")
def make_bench(profile, small_data, tmp_path_factory) -> Callable[[str], Bench]:
    """Callable that returns a new setup for a kind of job."""

    def make(kind: str) -> Bench:
        home = tmp_path_factory.mktemp(kind)
        dataset = small_data(kind)
        if kind == "latents":
            dataset = home / "dataset"
            shutil.copytree(small_data(kind), dataset)
        if kind == "caption":
            dataset = home / "dataset"
        return Bench(kind=kind, home=home, profile=profile, dataset=dataset)

    return make


@pytest.fixture(scope="module")
def undisturbed(make_bench) -> Callable[[str], dict[str, object]]:
    """Callable that returns the outputs of a job without faults."""

    @functools.cache
    def run_it(kind: str) -> dict[str, object]:
        bench = make_bench(kind)
        run = bench.begin()
        assert set(wait_for_end(run).values()) == {"done"}, runs.elements(run)
        return contents(bench, run)

    return run_it


# Each kind of job has a separate worker and cluster, because its tests mostly wait for Slurm.
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.xdist_group(f"slurm-{kind}")) for kind in IMAGES]
)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_changes_nothing(dev_cluster, make_bench, undisturbed, record_property, kind: str, fault) -> None:
    expected = undisturbed(kind)
    bench = make_bench(kind)
    run = bench.begin()
    job = wait_for_active_job(run)
    begun = time.monotonic()
    fault(bench, run, job, dev_cluster)
    run = runs.load(run.folder)
    states = wait_for_end(run)
    assert set(states.values()) == {"done"}, runs.elements(run)
    record_property(RECOVERY, (fault.__name__, kind, time.monotonic() - begun))
    actual = contents(bench, run)
    assert actual.keys() == expected.keys()
    assert all(actual[name] == expected[name] for name in expected)
    assert not list(bench.dataset.rglob(".*"))
    if fault not in (kill_a_task, cancel, restart_controller):
        assert max(line["restart"] for line in attempts(run.folder)) >= 1


@pytest.mark.parametrize("kind", ["caption", "train"])
def test_a_preempted_job_that_is_cancelled(dev_cluster, make_bench, undisturbed, tmp_path, kind: str) -> None:
    """Its partition, a hidden one, has PreemptMode=CANCEL: the job fails as preempted, and `retry` completes it."""
    expected = undisturbed(kind)
    hidden = tmp_path / "spot.toml"
    hidden.write_text(PROFILE.replace('partition = "main"', f'partition = "{SPOT}"'))
    bench = dataclasses.replace(make_bench(kind), profile=hidden)
    run = bench.begin()
    preempt(bench, run, wait_for_active_job(run), dev_cluster)
    states = wait_for_end(run)
    assert set(states.values()) <= {"failed", "done"}
    preempted = [item for item in runs.elements(run).values() if item.state == "failed"]
    assert preempted
    assert all(item.note.startswith("preempted: ") for item in preempted), preempted
    bench.retry(run)
    run = runs.load(run.folder)
    assert set(wait_for_end(run).values()) == {"done"}, runs.elements(run)
    assert contents(bench, run) == expected


def test_a_bad_node_is_avoided(dev_cluster, make_bench, undisturbed, tmp_path, capsys) -> None:
    """The preflight names the node that fails its check, and the job trains on the others, bit for bit as ever."""
    bad = tmp_path / "bad.toml"
    check = "test $SLURMD_NODENAME != n1 || { echo 'the GPU fell off the bus'; exit 1; }"
    bad.write_text(PROFILE.replace("signal_seconds", f'node_check = "{check}"\nsignal_seconds'))
    bench = dataclasses.replace(make_bench("train"), profile=bad)
    words = ["train", "--cluster", str(bad), "--dataset", str(bench.dataset), "--gpus-per-node", "2", "--nodes", "2"]
    submit(bench.home, *words, settings=SMALL)
    run = newest(bench.home, "train")
    assert wait_for_end(run) == {0: "done"}, runs.elements(run)
    starts = attempts(run.folder)
    assert {line["node"] for line in starts if line["restart"] == 0} == {"n1", "n2"}
    assert {line["node"] for line in starts if line["restart"] == 1} == {"n2", "n3"}
    assert contents(bench, run) == undisturbed("train")
    capsys.readouterr()
    submit(bench.home, "status", run.folder.name)
    printed = capsys.readouterr().out
    assert "avoids node n1: the GPU fell off the bus" in printed
    assert "attempts by node: n2 2, n1 1, n3 1" in printed


# Retry and status


def test_retry_submits_only_missing_elements(profile, tmp_path, capsys):
    """Five of 64 elements are killed, two of them while running; status names the five, and retry submits them."""
    words = ["caption", "--cluster", str(profile), "--dataset", str(tmp_path / "dataset"), *ALONE]
    submit(tmp_path, *words, "--array", "0-63%4", settings={"data.num_shards": 64, "data.max_images": 16_000})
    run = newest(tmp_path, "caption")
    slurm("scancel", *(run.job_of()[shard] for shard in (40, 55, 63)))
    wait_until(lambda: len(attempts(run.folder)) >= 2, description="two tasks")
    running = [line for line in attempts(run.folder)][:2]
    for line in running:
        os.kill(task_processes(line["job"])[-1], signal.SIGKILL)
    killed = sorted([line["arguments"][0][0] for line in running] + [40, 55, 63])
    states = wait_for_end(run, 600)
    assert sorted(shard for shard, state in states.items() if state in runs.UNFINISHED) == killed
    capsys.readouterr()
    submit(tmp_path, "status", run.folder.name, code=1)
    printed = capsys.readouterr().out
    assert re.findall("(?:failed|cancelled): shard ([0-9]+)", printed) == [str(shard) for shard in killed]
    submit(tmp_path, "retry", run.folder.name)
    again = runs.load(run.folder)
    assert sorted(shard for _, shards in again.jobs[len(run.jobs) :] for shard in shards) == killed
    assert set(wait_for_end(again).values()) == {"done"}
    submit(tmp_path, "retry", run.folder.name)
    assert len(runs.load(run.folder).jobs) == len(again.jobs)


@pytest.mark.parametrize("accounting", [False, True])
def test_status_agrees_with_slurm(dev_cluster, profile, tmp_path, tmp_path_factory, monkeypatch, accounting: bool):
    """While an array waits, runs, fails and ends, states equal those of squeue and, if available, of sacct."""
    cluster = dev_cluster
    if accounting:
        cluster = lifecycle.up(tmp_path_factory.mktemp("slurm"), nodes=1, accounting=True)
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    try:
        submit(
            *(tmp_path, "caption", "--cluster", str(profile), "--array", "0-5%2", *ALONE),
            settings={"data.num_shards": 6, "data.max_images": 6000},
        )
        run = newest(tmp_path, "caption")
        slurm("scancel", run.job_of()[5])
        killed, seen = "", set[str]()
        while (observation := compare_states_with_squeue(run))[1] or not killed:
            states, _ = observation
            seen |= set(states.values())
            if not killed and attempts(run.folder):
                killed = attempts(run.folder)[0]["job"]
                os.kill(task_processes(killed)[-1], signal.SIGKILL)
        assert {"pending", "running", "done"} <= seen
        states = {element.job: element.state for element in runs.elements(run).values()}
        # Some time after its end, and without accounting, Slurm no longer knows that a job was cancelled.
        assert {job for job, state in states.items() if state in runs.UNFINISHED} == {killed, run.job_of()[5]}
        assert states[killed] == "failed"
        if accounting:
            slurm("scontrol", "update", "nodename=n1", "state=drain", "reason=test")
            completed = set(states) - {killed, run.job_of()[5]}
            # The accounting database is updated some time after squeue.
            wait_until(
                lambda: completed_by_sacct(run) == completed, description=f"sacct to say COMPLETED of {completed}"
            )
    finally:
        if accounting:
            lifecycle.down(cluster.folder)


def completed_by_sacct(run: Run) -> set[str]:
    lines = slurm("sacct", "-X", "-n", "-P", "-o", "JobID,State", "-j", run.job_ids[0]).splitlines()
    return {job for job, word in (line.split("|") for line in lines) if word == "COMPLETED"}


def compare_states_with_squeue(run: Run) -> tuple[dict[str, str], bool]:
    """Return the suite's states by job, and whether jobs are active, after comparing the states with squeue's.

    They are compared only if the output of squeue has not changed in the meantime.
    """
    words = {"PENDING": "pending", "RUNNING": "running", "COMPLETING": "running", "CONFIGURING": "running"}

    def listed() -> dict[str, str]:
        lines = slurm("squeue", "--me", "--noheader", "-r", "-o", "%i %T").splitlines()
        return {job: words[state] for job, state in (line.split() for line in lines) if job in run.job_of().values()}

    before = listed()
    states = {element.job: element.state for element in runs.elements(run).values()}
    if before == listed():
        for job, state in states.items():
            # A job whose data is complete may still have a process that is exiting.
            assert state == before.get(job, state) or (state == "done" and before[job] == "running"), (states, before)
            assert job in before or state in ("done", *runs.UNFINISHED)
    return states, bool(before)


def test_shapes_beyond_the_partition_are_refused_with_nothing_written(dev_cluster, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    profile = tmp_path / "odd.toml"
    before = {line.split()[0] for line in slurm("squeue", "--noheader").splitlines()}
    for text, message in (
        ('executor = "slurm"\npartition = "nowhere"\n', "no such partition"),
        ('executor = "slurm"\npartition = "main"\ngpus_per_node = 9\n', "9 GPUs per node"),
        ('executor = "slurm"\npartition = "main"\n[minutes]\ntrain = 2000\n', "minutes.train=2000"),
        ('executor = "slurm"\npartition = "main"\n', "5 nodes"),
    ):
        profile.write_text(text)
        assert launch.main(["train", "--nodes", "5", "--cluster", str(profile)]) == 2
        errors = capfd.readouterr().err
        assert message in errors
        assert errors.count("\n") == 1
        assert list(tmp_path.iterdir()) == [profile]
    assert {line.split()[0] for line in slurm("squeue", "--noheader").splitlines()} <= before
