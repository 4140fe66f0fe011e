"""The development cluster: start and stop, coexistence, accounting."""

import os
import subprocess
import time

import pytest

from slurm.devcluster import lifecycle
from slurm.devcluster.__main__ import main
from slurm.devcluster.cluster import DevCluster

pytestmark = pytest.mark.slurm


def run(cluster: DevCluster, *words: str) -> str:
    return cluster.command(*words)


def test_two_clusters_coexist_and_leave_no_files(tmp_path):
    one = lifecycle.up(tmp_path / "one", nodes=2, gpus_per_node=8)
    try:
        other = lifecycle.up(tmp_path / "other", nodes=1, gpus_per_node=0, accounting=True)
        try:
            seen = run(
                one,
                "srun",
                "-N2",
                "-n2",
                "--gres=gpu:b200:8",
                "sh",
                "-c",
                "echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES",
            )
            assert sorted(seen.splitlines()) == ["n1 0,1,2,3,4,5,6,7", "n2 0,1,2,3,4,5,6,7"]
            run(other, "srun", "-n1", "true")
            deadline = time.monotonic() + 30
            while "COMPLETED" not in (listed := run(other, "sacct", "-X", "-n", "-P", "-o", "JobID,State")):
                assert time.monotonic() < deadline, listed
                time.sleep(0.5)
        finally:
            lifecycle.down(other.folder)
        assert run(one, "squeue", "--noheader") == ""  # it still runs after the other was stopped
        subprocess.Popen(
            ["sbatch", "--wrap", "sleep 600", "-o", "/dev/null"], env={**os.environ, **one.environment}
        ).wait()
        time.sleep(1)
        assert lifecycle.processes(one)
    finally:
        lifecycle.down(one.folder)
    assert lifecycle.processes(one) == lifecycle.processes(other) == []
    assert not one.folder.exists()
    assert not other.folder.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["down"], "holds no cluster"),
        (["status"], "holds no cluster"),
        (["up", "--folder", "with space"], "with space"),
        (["up", "--nodes", "0"], "--nodes"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(tmp_path, monkeypatch, capfd, arguments, message):
    monkeypatch.chdir(tmp_path)
    if "--folder" not in arguments:
        arguments = [*arguments, "--folder", "nothing"]
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    errors = capfd.readouterr().err
    assert code == 2
    assert message in errors
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
