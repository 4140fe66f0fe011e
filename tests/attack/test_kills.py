"""Jobs killed at random moments, each followed by the same job: the same bits, and nothing that is left over."""

import os
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from pixart.config.recipe import Recipe
from tests.attack.campaign import campaign
from tests.attack.killed_jobs import JOBS, compare, reset, results, undisturbed
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


@pytest.mark.parametrize("name", JOBS)
def test_a_killed_job_is_completed_by_the_same_command(name, small_recipe: Recipe, tmp_path, record_property):
    attack = campaign(f"kills of {name}", short=2, long=29)
    job = JOBS[name]
    template, folder, expected = undisturbed(job, small_recipe, tmp_path)
    reset(template, folder)
    begun = time.monotonic()
    ranks.run(job.ranks, job.function, str(folder))
    duration = time.monotonic() - begun
    assert results(folder, job) == expected
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
        else:
            compare(attack, label, job, folder, expected)
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
