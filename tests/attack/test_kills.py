"""Jobs killed at random moments, each followed by the same job: the same bits, and nothing that is left over."""

import hashlib
import os
import shutil
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pixart.atomic import SUFFIX
from pixart.config.recipe import Recipe
from tests.attack.campaign import campaign
from tests.attack.killed_jobs import JOBS, Job, reset
from tests.support import ranks

pytestmark = pytest.mark.slow
SHARED_MEMORY = Path("/dev/shm")
END_SECONDS = 120  # of a job


def descendants(pid: int) -> set[int]:
    """Return the processes that a process has started, and those that they have."""
    processes: set[int] = set()
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, path.read_text().split()):
                processes |= {child} | descendants(child)
    return processes


def wait(processes: list[BaseProcess]) -> list[int | None]:
    """Wait for the ranks of a job, and return their exit codes."""
    for process in processes:
        process.join(END_SECONDS)
    return [process.exitcode for process in processes]


def kill(processes: list[BaseProcess], seconds: float) -> set[int]:
    """Kill all ranks after some seconds, and return the processes that they had started."""
    processes[0].join(seconds)
    started = {child for process in processes if process.pid for child in descendants(process.pid)}
    for process in processes:
        process.kill()
    wait(processes)
    return started | {process.pid for process in processes if process.pid}


def results(folder: Path, job: Job) -> dict[str, str]:
    """Return the SHA-256 of the files that a job has made, by their paths."""
    paths = [path for path in sorted(folder.glob(job.results)) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(content(path)).hexdigest() for path in paths}


def content(path: Path) -> bytes:
    """Return the content of a file; of the captions without the seconds that the job took."""
    if path.suffix != ".parquet":
        return path.read_bytes()
    table = pq.read_table(path)
    return repr(table.select([name for name in table.column_names if name != "seconds"]).to_pydict()).encode()


def leftovers(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.name.endswith((SUFFIX, ".tmp"))]


@pytest.mark.parametrize("name", JOBS)
def test_a_killed_job_is_completed_by_the_same_command(name, small_recipe: Recipe, tmp_path, record_property):
    attack = campaign(f"kills of {name}", short=2, long=29)
    job, template, folder = JOBS[name], tmp_path / "template", tmp_path / "work"
    folder.mkdir()
    job.prepare(small_recipe, folder)
    shutil.copytree(folder, template)
    ranks.run(job.ranks, job.function, str(folder))
    reset(template, folder)
    begun = time.monotonic()
    ranks.run(job.ranks, job.function, str(folder))
    duration, expected = time.monotonic() - begun, results(folder, job)
    assert expected
    for number in range(attack.tries):
        reset(template, folder)
        seconds = duration * (number + attack.generator.random()) / attack.tries
        label = f"{name}, killed after {seconds:.2f} of {duration:.2f} s"
        pids = kill(ranks.start(job.ranks, job.function, str(folder)), seconds)
        again = ranks.start(job.ranks, job.function, str(folder))
        pids |= {process.pid for process in again if process.pid}
        attack.figures.tries += 1
        codes = wait(again)
        if codes != [0] * job.ranks:
            attack.wrong(label, f"the second command ended with {codes}")
        elif results(folder, job) != expected:
            attack.wrong(label, "its results have other bits")
        elif left := leftovers(folder):
            attack.wrong(label, f"left over: {left[:5]}")
        if alive := [pid for pid in pids if is_running(pid)]:
            attack.wrong(label, f"processes still run: {alive}")
        if shared := [path.name for path in SHARED_MEMORY.iterdir() if set(numbers(path.name)) & pids]:
            attack.wrong(label, f"shared memory is left: {shared}")
    attack.finish(record_property)


def numbers(name: str) -> list[int]:
    """Return the numbers in the name of a shared memory, such as the process of torch_PID_NUMBER."""
    return [int(word) for word in name.replace("-", "_").split("_") if word.isdecimal()]


def is_running(pid: int) -> bool:
    """Return whether a process exists and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_the_search_for_processes_finds_this_one():
    assert is_running(os.getpid())
    assert not is_running(2**22 - 1)
