"""A Slurm development cluster for the tests marked `slurm`, and helpers for its jobs."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from slurm.devcluster import lifecycle
from slurm.devcluster.cluster import DevCluster

NODES = 4


@pytest.fixture(scope="session")
def running_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevCluster]:
    """Cluster of four nodes with 8 GPUs each, without accounting."""
    if os.geteuid() != 0:
        pytest.skip("a Slurm cluster on this machine needs root")
    cluster = lifecycle.up(tmp_path_factory.mktemp("cluster") / "dev", nodes=NODES)
    yield cluster
    lifecycle.down(cluster.folder)


@pytest.fixture(scope="module")
def dev_cluster(running_cluster: DevCluster) -> Iterator[DevCluster]:
    """Cluster that the environment variables refer to while the tests of a module run."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in running_cluster.environment.items():
            patch.setenv(name, value)
        yield running_cluster


def wait_until(
    condition: Callable[[], bool], seconds: float = 300, description: str = "the condition", *, interval: float = 0.1
) -> float:
    """Wait for a condition, which is checked every `interval` seconds, and return the seconds waited.

    Raises AssertionError if it does not hold after `seconds`.
    """
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds, f"{description} did not come true in {seconds} s"
        time.sleep(interval)
    return time.monotonic() - begun


def task_processes(job: str) -> list[int]:
    """Return the IDs of a job's Python processes on the current cluster, oldest first; a job is `12` or `12_3`."""
    main, _, element = job.partition("_")
    cluster = f"SLURM_CONF={os.environ['SLURM_CONF']}"
    markers = [f"SLURM_ARRAY_JOB_ID={main}", f"SLURM_ARRAY_TASK_ID={element}"] if element else [f"SLURM_JOB_ID={main}"]
    pids = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            variables = (path / "environ").read_bytes().decode(errors="replace").split("\0")
            words = (path / "cmdline").read_bytes().split(b"\0")
            if b"submitit.core._submit" in words and b"srun" not in words[0] and {cluster, *markers} <= set(variables):
                pids.append(int(path.name))
    return sorted(pids)


def has_pending_signal(pid: int, number: signal.Signals) -> bool:
    """Return whether a stopped process has a signal pending, or has exited."""
    try:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return True
    masks = [int(line.split()[1], 16) for line in status if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


def slurm(*words: str) -> str:
    """Run a Slurm command and return its output. Raises CalledProcessError if it fails."""
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def accepted(*words: str) -> bool:
    """Return whether a Slurm command succeeds."""
    return subprocess.run(words, capture_output=True).returncode == 0
