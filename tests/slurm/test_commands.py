import os
import subprocess
import sys

import pytest

from slurm import commands
from slurm.commands import JobState, expand, parse, parse_minutes


def test_parse_squeue_listing():
    listing = (
        "12_3|RUNNING|None\n12_[5-6,9%4]|PENDING|Resources\n13|CANCELLED by 1000|None\n14|FAILED|NonZeroExitCode\n"
    )
    states = parse(listing)
    assert states["12_3"] == JobState(state="RUNNING")
    assert {job for job, state in states.items() if state.pending} == {"12_5", "12_6", "12_9"}
    assert states["12_9"].reason == "Resources"
    assert {job for job, state in states.items() if state.ended} == {"13", "14"}
    assert states["13"].state == "CANCELLED"


def test_elements_of_an_array():
    assert list(expand("7_[0-2,8%1]")) == ["7_0", "7_1", "7_2", "7_8"]
    assert list(expand("7_4")) == ["7_4"]
    assert list(expand("7")) == ["7"]


@pytest.mark.parametrize(
    ("text", "minutes"),
    [("infinite", None), ("1-00:00:00", 1440), ("2-12:30:00", 3630), ("4:00:00", 240), ("30:00", 30)],
)
def test_time_limits(text: str, minutes: int | None):
    assert parse_minutes(text) == minutes


def test_local_jobs_are_processes_of_submitit():
    job = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "submitit"])
    try:
        assert commands.states("local", [str(job.pid), str(os.getpid()), "none"]) == {
            str(job.pid): JobState(state="RUNNING")
        }
        commands.cancel("local", [str(job.pid), str(os.getpid())])
        assert job.wait(10) != 0
        assert commands.states("local", [str(job.pid)]) == {}
    finally:
        job.kill()


def test_error_without_slurm(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="no Slurm"):
        commands.states("slurm", ["1"])


def test_a_local_job_that_has_just_begun_is_running():
    """Just after a program has started, the kernel shows an empty command line."""
    for _ in range(100):
        job = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "submitit"])
        try:
            assert commands.is_running(str(job.pid))
        finally:
            job.kill()
            job.wait()
