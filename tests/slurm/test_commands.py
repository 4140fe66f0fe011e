import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from slurm import commands
from slurm.commands import JobState, SlurmUnavailableError, expand, parse

# Listings as the commands of three versions print them: `id|state|end|reason`.
SQUEUE_22_05 = """12_3|RUNNING|2026-11-27T09:00:00|None
12_[5-6,9%4]|PENDING|N/A|Resources
13|COMPLETING|2026-11-27T08:00:00|None
14|REQUEUE_HOLD|N/A|job_requeued_in_held_state
15|SPECIAL_EXIT|N/A|JobHeldUser
"""
SACCT_23_11 = """13|CANCELLED by 1000|2026-11-27T08:00:00|None
14|FAILED|2026-11-27T08:00:00|NonZeroExitCode
15|PREEMPTED|2026-11-27T08:00:00|None
16_1|NODE_FAIL|2026-11-27T08:00:00|None
16_1.batch|CANCELLED|2026-11-27T08:00:00|
16_2|OUT_OF_ME+|2026-11-27T08:00:00|None
17|COMPLETED|Unknown|None
"""
SACCT_25_05 = """20|LAUNCH_FAILED|2026-11-27T08:00:00|None
21|RECONFIG_FAIL|2026-11-27T08:00:00|None
22|DEADLINE|2026-11-27T08:00:00|None
23|RESV_DEL_HOLD|Unknown|Reservation | gone
24|EXPEDITING|Unknown|None
25|WARPING|Unknown|None
sacct: warning: the clock of the database is 600 s off
"""


def test_listings_of_several_versions():
    states = parse(SQUEUE_22_05)
    assert states["12_3"].running
    assert [states[f"12_{index}"].pending for index in (5, 6, 9)] == [True] * 3
    assert states["12_5"].reason == "Resources"
    assert states["13"].running
    assert states["14"].pending
    assert states["15"].pending

    states = parse(SACCT_23_11)
    assert states["13"] == JobState(state="CANCELLED", end=datetime(2026, 11, 27, 8).timestamp())
    assert all(states[job].ended for job in ("13", "14", "15", "16_1", "17"))
    assert "16_1.batch" not in states  # a step of the job
    assert states["17"].end is None

    states = parse(SACCT_25_05)
    assert all(states[job].ended for job in ("20", "21", "22"))
    assert (states["23"].pending, states["23"].reason) == (True, "Reservation | gone")
    assert states["24"].running
    unknown = states["25"]  # reported by its word, and in no group
    assert (unknown.state, unknown.pending, unknown.running, unknown.ended) == ("WARPING", False, False, False)
    assert len(states) == 6


def test_every_state_is_in_one_group():
    groups = (commands.TERMINAL_STATES, commands.PENDING_STATES, commands.RUNNING_STATES)
    assert sum(map(len, groups)) == len(set.union(*groups))


def test_elements_of_an_array():
    assert list(expand("7_[0-2,8%1]")) == ["7_0", "7_1", "7_2", "7_8"]
    assert list(expand("7_[0-8:4,20]")) == ["7_0", "7_4", "7_8", "7_20"]
    assert list(expand("7_[1-2,5,...]")) == ["7_1", "7_2", "7_5"]  # cut off
    assert list(expand("7_[1-2,5,1...")) == ["7_1", "7_2", "7_5"]
    assert list(expand("7_4")) == ["7_4"]
    assert list(expand("7")) == ["7"]


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


def test_a_controller_that_does_not_answer_ends_no_job(programs):
    programs(squeue="echo 'slurm_load_jobs error: Socket timed out on send/recv operation' >&2; exit 1")
    with pytest.raises(SlurmUnavailableError, match="Socket timed out"):
        commands.states("slurm", ["1"])
    refused = "sacct: error: slurm_persist_conn_open: failed to open persistent connection: Connection refused"
    programs(squeue="true", sacct=f"echo '{refused}' >&2; exit 1")
    with pytest.raises(SlurmUnavailableError, match="Connection refused"):
        commands.states("slurm", ["1"])
    programs(sacct="echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert commands.states("slurm", ["1"]) == {}  # without accounting, an ended job is not known


def test_squeue_goes_before_sacct(programs):
    """A requeued job is pending, although sacct has the end of its first attempt."""
    programs(squeue="echo '7|PENDING|N/A|BeginTime'")
    programs(sacct="echo '7|PREEMPTED|Unknown|None'; echo '8|TIMEOUT|Unknown|None'")
    states = commands.states("slurm", ["7", "8"])
    assert (states["7"].state, states["8"].state) == ("PENDING", "TIMEOUT")


def test_array_expressions_are_not_cut_off(programs, tmp_path):
    programs(squeue=f"echo $SLURM_BITSTR_LEN > {tmp_path}/length")
    programs(sacct="true")
    commands.states("slurm", ["1"])
    assert Path(tmp_path, "length").read_text() == "0\n"
