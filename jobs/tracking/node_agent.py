"""A small process beside the first rank of each node: the node's own figures go into the journal, and, where MLflow is
a server that the first node reaches, the journal into it.

It ends with the rank, however that ends: its standard input closes. It never imports torch; MLflow, for a server.
"""

import fcntl
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
from jobs.tracking.mlflow_store import Tracker, store_uri
from jobs.tracking.sync import try_publish

SECONDS = 15.0  # between two looks at the node
LAST_SECONDS = 60.0  # that a finished rank waits for its last points to be sent
ROOT = Path(__file__).parents[2]
MEGABYTE = 1e6  # as in MLflow's system metrics, whose names these are
LOCK = ".published"  # its time says when an element has last brought something
PAUSE_SECONDS = 60.0


def accompanied(function: Callable[..., Any], run: str, *arguments: Any, **request: Any) -> Any:
    """Calls `function(run, ...)`, on the first rank of a node with a companion; the very first says how it ended."""
    import submitit

    place = submitit.JobEnvironment()
    if place.local_rank:
        return function(run, *arguments, **request)
    words = [sys.executable, "-m", "jobs.tracking.node_agent", run, str(place.node)]
    companion = subprocess.Popen(words, stdin=subprocess.PIPE, cwd=ROOT)
    assert companion.stdin
    try:
        result = function(run, *arguments, **request)
        if place.global_rank == 0:
            set_status(Path(run), "FINISHED")
        return result
    except Exception:
        if place.global_rank == 0:
            set_status(Path(run), "FAILED")
        raise
    finally:
        companion.stdin.close()
        try:
            companion.wait(LAST_SECONDS)
        except subprocess.TimeoutExpired:
            companion.kill()


def published(function: Callable[..., Any], run: str, *arguments: Any) -> None:
    """Calls `function(...)`, an array's element; then one of all elements, once a minute at most, brings their run to
    an MLflow server."""
    function(*arguments)
    home = Path(run).parents[1]
    if not store_uri(home).startswith("http"):
        return
    with (Path(run) / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another has it; or the file system has no locks, and the launcher brings the run there
            return
        if time.time() - os.fstat(file.fileno()).st_mtime > PAUSE_SECONDS or not file.tell():
            words = [sys.executable, "-m", "jobs.tracking.sync", str(home), run]
            with suppress(subprocess.TimeoutExpired):
                subprocess.run(words, cwd=ROOT, timeout=LAST_SECONDS)
            file.write(".")


def main(run: str, node: str) -> None:
    os.nice(19)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends when the rank does
    folder, journal = Path(run), Journal(run)
    begun = read_description(folder)["begun"]
    tracker = Tracker(folder.parents[1])
    busy = processor_times()
    while True:
        ended = bool(select.select([sys.stdin], [], [], SECONDS)[0])
        before, busy = busy, processor_times()
        figures = node_figures(folder, before, busy)
        journal.metrics(
            int(time.time() - begun), {f"system/node_{node}/{name}": value for name, value in figures.items()}
        )
        if node == "0" and tracker.uri.startswith("http"):
            try_publish(tracker, folder)
        if ended:
            return


def node_figures(folder: Path, before: tuple[int, int], after: tuple[int, int]) -> dict[str, float]:
    """Processors and memory of the node, room where the run lies, and GPUs as nvidia-smi has them."""
    passed = max(1, after[1] - before[1])
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    used = sum(sign * int(memory[name].split()[0]) for name, sign in (("MemTotal", 1), ("MemAvailable", -1)))
    found = {
        "cpu_utilization_percentage": 100 * (after[0] - before[0]) / passed,
        "system_memory_usage_megabytes": used * 1024 / MEGABYTE,
        "disk_available_megabytes": shutil.disk_usage(folder).free / MEGABYTE,
    }
    return found | gpu_figures()


def processor_times() -> tuple[int, int]:
    """Busy and all ticks of all processors since the node came up."""
    ticks = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def gpu_figures() -> dict[str, float]:
    """Means over the node's GPUs; nothing where there are none."""
    if not shutil.which("nvidia-smi"):
        return {}
    words = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used,power.draw", "--format=csv,noheader,nounits"]
    done = subprocess.run(words, capture_output=True, text=True)
    rows = [[float(cell) for cell in line.split(",")] for line in done.stdout.splitlines() if "N/A" not in line]
    if done.returncode or not rows:
        return {}
    use, memory, power = (sum(column) / len(rows) for column in zip(*rows, strict=True))
    return {
        "gpu_utilization_percentage": use,
        "gpu_memory_usage_megabytes": memory * 2**20 / MEGABYTE,  # nvidia-smi has MiB
        "gpu_power_usage_watts": power,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
