"""The node agent: a process beside the first rank of each node that logs system metrics to the journal.

On the first node it also sends the journal to an MLflow server. Its standard input closes when the rank ends in any
way, and the agent ends with it. It never imports torch, and imports MLflow only for a server.
"""

import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from jobs.state.journal import Journal
from jobs.state.run_metadata import read_description, set_status
from jobs.tracking.embedded_store import store_uri
from jobs.tracking.mlflow_store import Tracker
from jobs.tracking.sync import try_sync
from pixart.atomic import file_lock

SAMPLE_SECONDS = 15.0  # between two samples of the system metrics
SHUTDOWN_SECONDS = 60.0  # timeout for sending the last metrics of a finished rank
ROOT = Path(__file__).parents[2]
MEGABYTE = 1e6  # bytes, the unit of MLflow's system metrics
LOCK = ".node_sync.lock"
NVIDIA_SMI_SECONDS = 20  # it waits for a GPU that is being reset
LAST_SYNC = ".last-node-sync"  # modified by each synchronization
SYNC_SECONDS = 60.0  # shortest interval between two synchronizations by array elements


def with_node_agent(function: Callable[..., Any], run: str, *arguments: Any, **request: Any) -> Any:
    """Call `function(run, ...)`, with a node agent if this is the first rank of a node.

    Global rank 0 sets the run's status when the function ends.
    """
    import submitit

    environment = submitit.JobEnvironment()
    if environment.local_rank:
        return function(run, *arguments, **request)
    command = [sys.executable, "-m", "jobs.tracking.node_agent", run, str(environment.node)]
    agent = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT)
    assert agent.stdin
    try:
        result = function(run, *arguments, **request)
        if environment.global_rank == 0:
            set_status(Path(run), "FINISHED", time.time())
        return result
    except Exception:
        if environment.global_rank == 0:
            set_status(Path(run), "FAILED", time.time())
        raise
    finally:
        agent.stdin.close()
        try:
            agent.wait(SHUTDOWN_SECONDS)
        except subprocess.TimeoutExpired:
            agent.kill()


def with_sync(function: Callable[..., Any], run: str, *arguments: Any) -> None:
    """Call `function(...)` for an array element, then synchronize the run with an MLflow server.

    Only one element at a time synchronizes, at most once per minute. Without a server, the launcher does.
    """
    function(*arguments)
    home = Path(run).parent.parent
    if not store_uri(home).startswith("http"):
        return
    last_sync = Path(run) / LAST_SYNC
    with file_lock(Path(run) / LOCK, wait=False) as held:
        # A clock that was set back must not stop synchronization until it has caught up.
        if held and (not last_sync.exists() or abs(time.time() - last_sync.stat().st_mtime) > SYNC_SECONDS):
            command = [sys.executable, "-m", "jobs.tracking.sync", str(home), run]
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(command, cwd=ROOT, timeout=SHUTDOWN_SECONDS)
            last_sync.touch()


def main(run: str, node: str) -> None:
    """Log system metrics every SECONDS until standard input closes."""
    os.nice(19)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the agent outlives an interrupt, and ends with the rank
    folder, journal = Path(run), Journal(run)
    begun = read_description(folder)["begun"]
    tracker = Tracker(folder.parent.parent)
    ticks = processor_times()
    while True:
        ended = bool(select.select([sys.stdin], [], [], SAMPLE_SECONDS)[0])
        previous, ticks = ticks, processor_times()
        values = node_metrics(folder, previous, ticks)
        journal.metrics(
            int(time.time() - begun), {f"system/node_{node}/{name}": value for name, value in values.items()}
        )
        if node == "0" and tracker.uri.startswith("http"):
            try_sync(tracker, folder)
        if ended:
            return


def node_metrics(folder: Path, before: tuple[int, int], after: tuple[int, int]) -> dict[str, float]:
    """Return the utilization of the node's CPUs, memory, disk and GPUs, under the names of MLflow's system metrics.

    `before` and `after` are results of `processor_times`; the disk is that of `folder`.
    """
    elapsed = max(1, after[1] - before[1])
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    used = sum(sign * int(memory[name].split()[0]) for name, sign in (("MemTotal", 1), ("MemAvailable", -1)))
    total = int(memory["MemTotal"].split()[0])
    disk = shutil.disk_usage(folder)
    metrics = {
        "cpu_utilization_percentage": 100 * (after[0] - before[0]) / elapsed,
        "system_memory_usage_megabytes": used * 1024 / MEGABYTE,
        "system_memory_usage_percentage": 100 * used / total,
        "disk_usage_megabytes": disk.used / MEGABYTE,
        "disk_usage_percentage": 100 * disk.used / disk.total,
        "disk_available_megabytes": disk.free / MEGABYTE,
    }
    return metrics | gpu_metrics()


def processor_times() -> tuple[int, int]:
    """Return the busy and the total clock ticks of all processors since boot."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def gpu_metrics() -> dict[str, float]:
    """Return metrics of nvidia-smi, as means over the node's GPUs; empty without GPUs, or if it does not answer.

    Where nvidia-smi has words such as `[Not Supported]` in place of a number, that GPU is left out of that mean.
    """
    names = ("gpu_utilization_percentage", "gpu_memory_usage_megabytes", "gpu_power_usage_watts")
    factors = (1.0, 2**20 / MEGABYTE, 1.0)  # nvidia-smi reports MiB
    command = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used,power.draw", "--format=csv,noheader,nounits"]
    try:
        process = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=NVIDIA_SMI_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return {}
    if process.returncode:
        return {}
    columns: dict[str, list[float]] = {name: [] for name in names}
    for line in process.stdout.splitlines():
        for name, factor, cell in zip(names, factors, line.split(","), strict=False):
            with suppress(ValueError):
                columns[name].append(factor * float(cell))
    return {name: sum(values) / len(values) for name, values in columns.items() if values}


if __name__ == "__main__":
    main(*sys.argv[1:])
