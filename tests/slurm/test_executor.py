import dataclasses
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import submitit

from slurm import commands
from slurm import profile as profiles
from slurm.executor import Cluster, environment
from slurm.sbatch import outside_of_a_job
from slurm.task import ATTEMPTS, RESULT, TaskInterrupted, attempts, stop_level
from tests.support.cluster_fixture import wait_until

GOLDEN = Path(__file__).parent / "golden"


def squares(elements: list[int]) -> list[tuple[int, int, str]]:
    return [(element, os.getpid(), os.environ["OMP_NUM_THREADS"]) for element in elements]


def rank() -> tuple[int, int, str]:
    environment = submitit.JobEnvironment()
    return environment.global_rank, environment.num_tasks, os.environ.get("MALLOC_TOP_PAD_", "")


def sleep() -> None:
    time.sleep(60)


def until_signalled() -> None:
    while not stop_level():
        time.sleep(0.05)
    (Path(os.environ["SUBMITIT_FOLDER"]).parent / "saved").touch()
    raise TaskInterrupted(stop_level())


@pytest.fixture
def local() -> profiles.Profile:
    return dataclasses.replace(profiles.load("local"), array_parallelism=3)


def test_array_shares_elements_over_bounded_processes(local, tmp_path: Path):
    cluster = Cluster(local, tmp_path)
    (submitted,) = cluster.submit_array(cluster.array_shape("caption", range(10)), squares)
    assert [item.elements for item in submitted] == [(0, 3, 6, 9), (1, 4, 7), (2, 5, 8)]
    results = [row for item in submitted for row in item.job.result()]
    assert sorted(element for element, _, _ in results) == list(range(10))
    assert len({process for _, process, _ in results}) == 3
    assert sorted(line["arguments"] for line in attempts(tmp_path)) == [[[0, 3, 6, 9]], [[1, 4, 7]], [[2, 5, 8]]]
    assert [len(part) for part in cluster.submit_array(cluster.array_shape("caption", [4]), squares)] == [1]


def gpus(elements: list[int]) -> str:
    return os.environ["CUDA_VISIBLE_DEVICES"]


def test_array_processes_have_one_gpu_per_process(local, tmp_path: Path):
    cluster = Cluster(dataclasses.replace(local, array_parallelism=0, gpus_per_node=2), tmp_path)
    (submitted,) = cluster.submit_array(cluster.array_shape("caption", range(6)), gpus)
    assert [(item.elements, item.job.result()) for item in submitted] == [((0, 2, 4), "0"), ((1, 3, 5), "1")]


def test_local_ranks_are_processes(local, tmp_path: Path):
    cluster = Cluster(local, tmp_path)
    job = cluster.submit_ranks(cluster.ranks_shape("train", 4, None), rank).job
    assert sorted(job.results()) == [(index, 4, "67108864") for index in range(4)]
    assert json.loads((tmp_path / RESULT).read_text()) == [0, 4, "67108864"]
    assert "MALLOC_TOP_PAD_" not in os.environ


@pytest.mark.parametrize("cooperative", [False, True])
def test_a_signal_ends_a_task(local, tmp_path: Path, cooperative: bool):
    """A cooperative task, which checks for the signal, saves before it ends; any other task is interrupted."""
    cluster = Cluster(local, tmp_path)
    shape = cluster.ranks_shape("train", 1, None)
    job = cluster.submit_ranks(shape, until_signalled if cooperative else sleep, cooperative=cooperative).job
    while not attempts(tmp_path):
        time.sleep(0.05)
    time.sleep(0.5)
    commands.cancel("local", [job.job_id])
    deadline = time.monotonic() + 20
    while commands.states("local", [job.job_id]):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not (tmp_path / RESULT).exists()
    assert "interrupted: the job is being terminated" in (tmp_path / "logs" / f"{job.job_id}_0_log.err").read_text()
    assert (tmp_path / "saved").exists() == cooperative


def test_a_submission_from_within_a_job_has_none_of_its_variables(monkeypatch):
    inherited = {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_CPU": "100", "SBATCH_QOS": "low", "MASTER_PORT": "1", "HOME": "/h"}
    for name, value in {**inherited, "SLURM_CONF": "/conf"}.items():
        monkeypatch.setenv(name, value)
    with outside_of_a_job():
        assert {name for name in inherited if name in os.environ} == {"HOME"}
        assert os.environ["SLURM_CONF"] == "/conf"
    assert {name: os.environ[name] for name in inherited} == inherited
    monkeypatch.delenv("SLURM_JOB_ID")
    with outside_of_a_job():  # the user's own settings stay
        assert os.environ["SBATCH_QOS"] == "low"


def test_environment_is_restored(monkeypatch):
    monkeypatch.setenv("PIXART_A", "mine")
    with environment({"PIXART_A": "theirs", "PIXART_B": "theirs"}):
        assert (os.environ["PIXART_A"], os.environ["PIXART_B"]) == ("theirs", "theirs")
    assert os.environ["PIXART_A"] == "mine"
    assert "PIXART_B" not in os.environ


def test_local_environment_keeps_set_variables_and_adds_the_code_to_pythonpath(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    variables = Cluster(profiles.load("local"), tmp_path).local_environment(processes=1)
    assert "OMP_NUM_THREADS" not in variables
    assert variables["PYTHONPATH"] == f"{Path(__file__).parents[2]}:/elsewhere"


def wait_for(file: Path) -> str:
    while not file.exists():
        time.sleep(0.01)
    return file.name


@pytest.mark.slow
@pytest.mark.parametrize("is_array", [False, True])
def test_local_processes_outlive_an_interrupt(tmp_path: Path, is_array: bool):
    """Ctrl-C reaches all processes of a terminal; the launcher alone ends them."""
    cluster, file = Cluster(profiles.load("local"), tmp_path), tmp_path / "go"
    if is_array:
        ((submitted,),) = cluster.submit_array(cluster.array_shape("caption", [0]), lambda _: wait_for(file))
    else:
        submitted = cluster.submit_ranks(cluster.ranks_shape("train", 1, 1), lambda: wait_for(file))
    controller = int(submitted.job.job_id)
    wait_until((tmp_path / ATTEMPTS).exists, 30)
    (task,) = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
    for process in (controller, int(task)):
        os.kill(process, signal.SIGINT)
    time.sleep(1.5)  # submitit's controller waits for a second before it kills
    assert submitted.job.state == "RUNNING"
    file.touch()
    assert submitted.job.result() == "go"
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.parametrize("name", sorted(path.stem for path in profiles.FOLDER.glob("*.toml") if path.stem != "local"))
def test_sbatch_scripts_equal_the_golden_files(monkeypatch, name: str):
    """The text passed to sbatch equals the golden file for each job of a profile.

    `REWRITE_GOLDEN=1` rewrites the golden files.
    """
    monkeypatch.setenv("SLURM_ACCOUNT", "group")
    monkeypatch.setenv("PIXART_MAIL", "someone@example.org")
    monkeypatch.setattr("sys.executable", "/opt/suite/bin/python")
    cluster = Cluster(profiles.load(name), Path("/home/user/my runs/RUN"), code=Path("/home/user/my runs/RUN/code-1"))
    after = Cluster(cluster.profile, cluster.run, code=cluster.code, after=["17", "18"])
    texts = {
        "caption": cluster.sbatch_text(cluster.array_shape("caption", range(256))),
        "adopt": cluster.sbatch_text(cluster.array_shape("adopt", range(8))),
        "latents": after.sbatch_text(cluster.array_shape("latents", [3, 7, 9])),
        "train": cluster.sbatch_text(cluster.ranks_shape("train", 4, None)),
        "convert": after.sbatch_text(cluster.ranks_shape("convert", 1, 1)),
        **{
            kind: cluster.sbatch_text(cluster.ranks_shape(kind, 1, 1))
            for kind in ("init", "audit", "verify", "sample", "recaption")
        },
    }
    for kind, text in texts.items():
        golden = GOLDEN / f"{name}-{kind}.sbatch"
        if os.environ.get("REWRITE_GOLDEN"):
            golden.write_text(text + "\n")
        assert text + "\n" == golden.read_text()


@pytest.mark.parametrize("kind", ["init", "adopt", "audit", "verify"])
def test_jobs_that_compute_nothing_on_a_gpu_request_none(kind: str):
    assert "gpu" not in (GOLDEN / f"hpg-b200-{kind}.sbatch").read_text().replace("hpg-b200", "")


@pytest.mark.parametrize(("per_task", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (9, [5])])
def test_elements_share_the_tasks_of_an_array(tmp_path: Path, per_task: int, sizes: list[int]):
    cluster = Cluster(profiles.load("dev"), tmp_path)
    shape = cluster.array_shape("caption", [1, 3, 4, 6, 7], per_task)
    assert [len(shards) for shards in shape.tasks] == sizes
    assert [shard for shards in shape.tasks for shard in shards] == [1, 3, 4, 6, 7]
    directive = re.search("--array=(.*)", cluster.sbatch_text(shape))
    assert (directive and directive[1]) == (f"0-{len(sizes) - 1}%{min(4, len(sizes))}" if len(sizes) > 1 else None)


def test_hostile_values_are_not_executed(tmp_path: Path):
    """The text runs in a shell with no-op srun and module, which print the values as literal arguments."""
    hostile = f"$(touch {tmp_path}/ran) `touch {tmp_path}/ran` '\";touch {tmp_path}/ran;"
    profile = dataclasses.replace(
        profiles.load("dev"),
        environment={"VALUE": hostile},
        modules=[hostile],
        srun_args=[hostile],
        partition=hostile,
        container=hostile,
    )
    cluster = Cluster(profile, tmp_path / hostile.replace("/", "_"))
    text = cluster.sbatch_text(cluster.ranks_shape("train", 1, 1))
    stubs = 'srun() { printf "%s\\n" "$@"; }; module() { :; };\n'
    done = subprocess.run(["bash", "-c", stubs + text + '\nprintf "%s" "$VALUE"'], capture_output=True, text=True)
    assert done.stdout.endswith(hostile), done
    assert hostile in done.stdout.splitlines()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["line\nbreak", "nul\0"])
def test_a_line_break_is_refused(name: str, tmp_path: Path):
    """Directives are parsed line by line by sbatch, where quoting a line break has no effect."""
    cluster = Cluster(dataclasses.replace(profiles.load("dev"), account=name), tmp_path)
    with pytest.raises(ValueError, match="account"):
        cluster.sbatch_text(cluster.ranks_shape("train", 1, 1))
    cluster = Cluster(profiles.load("dev"), tmp_path / name)
    with pytest.raises(ValueError, match="folder"):
        cluster.sbatch_text(cluster.ranks_shape("train", 1, 1))
