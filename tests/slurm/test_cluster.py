import dataclasses
import os
from pathlib import Path

import pytest
import submitit

from slurm import profile as profiles
from slurm.cluster import Cluster, environment, slurm_parameters


def squares(elements: list[int]) -> list[tuple[int, int, str]]:
    return [(element, os.getpid(), os.environ["OMP_NUM_THREADS"]) for element in elements]


def rank() -> tuple[int, int, str]:
    found = submitit.JobEnvironment()
    return found.global_rank, found.num_tasks, os.environ.get("MALLOC_TOP_PAD_", "")


@pytest.fixture
def local() -> profiles.Profile:
    return dataclasses.replace(profiles.load("local"), array_parallelism=3)


def test_array_shares_elements_over_bounded_processes(local, tmp_path: Path):
    jobs = Cluster(local, tmp_path).submit_array("caption", squares, list(range(10)))
    assert len(jobs) == 3
    results = [row for job in jobs for row in job.result()]
    assert sorted(element for element, _, _ in results) == list(range(10))
    assert len({process for _, process, _ in results}) == 3
    assert len(Cluster(local, tmp_path).submit_array("caption", squares, [4])) == 1


def test_ranks_of_nodes_are_processes_here(local, tmp_path: Path):
    job = Cluster(local, tmp_path).submit_ranks("train", 4, rank)
    assert sorted(job.results()) == [(index, 4, "67108864") for index in range(4)]
    assert "MALLOC_TOP_PAD_" not in os.environ


def test_environment_is_put_back(monkeypatch):
    monkeypatch.setenv("PIXART_A", "mine")
    with environment({"PIXART_A": "theirs", "PIXART_B": "theirs"}):
        assert (os.environ["PIXART_A"], os.environ["PIXART_B"]) == ("mine", "theirs")
    assert os.environ["PIXART_A"] == "mine"
    assert "PIXART_B" not in os.environ


def test_sbatch_text_of_a_b200_training_job(monkeypatch, tmp_path: Path):
    """submitit makes the text from our parameters: the lines that Slurm will read."""
    monkeypatch.setenv("SLURM_ACCOUNT", "group")
    monkeypatch.setenv("PIXART_MAIL", "someone@example.org")
    profile = dataclasses.replace(profiles.load("hpg-b200"), environment={"A": "b c"}, setup=["module load cuda"])
    parameters = slurm_parameters(profile, "train", 4, 8, 8, 32)
    from submitit.slurm.slurm import _make_sbatch_string

    array = parameters.pop("array_parallelism")
    assert array == 32
    text = _make_sbatch_string(command="run", folder=tmp_path, **parameters)
    lines = text.splitlines()
    for line in (
        "#SBATCH --account=group",
        "#SBATCH --partition=hpg-b200",
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --gres=gpu:b200:8",
        "#SBATCH --cpus-per-task=14",
        "#SBATCH --time=1440",
        "#SBATCH --mail-user=someone@example.org",
        "#SBATCH --mail-type=FAIL,REQUEUE",
        "module load cuda",
        "export A='b c'",
    ):
        assert line in lines, line
    assert "--cpus-per-task=14" in lines[-1]
