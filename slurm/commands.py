"""Queries and control of jobs by Slurm's commands: squeue, sacct (if there is accounting), scontrol and scancel.

Jobs of the local executor are processes, whose state is read from /proc.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

COMMAND_TIMEOUT_SECONDS = 60
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 2.0, 60.0  # between attempts to reach a controller that does not answer
PATIENCE_SECONDS = 600.0  # after which a submission gives up
# Job states of Slurm 22.05 to 25.05, as squeue and sacct name them ("Job state codes" in their manuals). An ended job
# may have been requeued: then squeue lists it as pending, which takes precedence over what sacct says.
TERMINAL_STATES = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "LAUNCH_FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "RECONFIG_FAIL",
    "REVOKED",
    "TIMEOUT",
}
PENDING_STATES = {
    "PENDING",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "RESV_DEL_HOLD",
    "SPECIAL_EXIT",
    "STOPPED",
    "SUSPENDED",
}
RUNNING_STATES = {
    "COMPLETING",
    "CONFIGURING",
    "EXPEDITING",
    "POWER_UP_NODE",
    "RESIZING",
    "RUNNING",
    "SIGNALING",
    "STAGE_OUT",
    "UPDATE_DB",
}
NO_ACCOUNTING = re.compile("accounting storage is disabled|no such command", re.IGNORECASE)
NO_ANSWER = re.compile(
    "unable to contact slurm controller|socket timed out|connection refused|zero bytes|communication connection"
    "|problem talking to the database|connection (?:reset|failure)|slurm_persist_conn_open|resource temporarily",
    re.IGNORECASE,
)
# Array expressions in full: by default, squeue cuts them off after 64 characters.
ENVIRONMENT = {"SLURM_BITSTR_LEN": "0"}
Value = TypeVar("Value")


class SlurmError(ValueError):
    """A Slurm command failed; the message is the last line of its standard error."""


class SlurmUnavailableError(SlurmError):
    """Slurm's controller or database did not answer, which says nothing about the jobs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobState:
    """State of a job: `state` as Slurm names it; `reason` is why the job waits, or how it ended."""

    state: str
    reason: str = ""
    end: float | None = None  # seconds since the epoch

    @property
    def pending(self) -> bool:
        """Whether the job is in the queue, held or suspended."""
        return self.state in PENDING_STATES

    @property
    def running(self) -> bool:
        """Whether the job is on its nodes."""
        return self.state in RUNNING_STATES

    @property
    def ended(self) -> bool:
        """Whether the job has ended."""
        return self.state in TERMINAL_STATES


def command(*words: str) -> str:
    """Run a Slurm command and return its output.

    Raises SlurmUnavailableError if Slurm does not answer; SlurmError, with the last line of the command's standard
    error, if the command is missing or fails.
    """
    environment = {**os.environ, **ENVIRONMENT}
    try:
        process = subprocess.run(
            words, capture_output=True, text=True, errors="replace", timeout=COMMAND_TIMEOUT_SECONDS, env=environment
        )
    except FileNotFoundError:
        raise SlurmError(f"{words[0]}: no such command; this machine has no Slurm, choose another --cluster") from None
    except subprocess.TimeoutExpired:
        raise SlurmUnavailableError(
            f"{words[0]}: no answer within {COMMAND_TIMEOUT_SECONDS} s; check that slurmctld is up"
        ) from None
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        raise error_of(f"{words[0]}: {lines[-1]}", process.stderr)
    return process.stdout


def error_of(message: str, output: str | None = None) -> SlurmError:
    """Return the exception with a message: SlurmUnavailableError if it says that Slurm did not answer.

    `output` is the whole of what the command wrote, where the message is a part of it.
    """
    return (SlurmUnavailableError if NO_ANSWER.search(output or message) else SlurmError)(message)


def patiently(query: Callable[[], Value]) -> Value:
    """Call `query` again, after growing pauses, while Slurm does not answer, and return its result.

    Raises SlurmUnavailableError if Slurm does not answer for PATIENCE_SECONDS.
    """
    pause, deadline = FIRST_PAUSE_SECONDS, time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return query()
        except SlurmUnavailableError as error:
            if time.monotonic() + pause > deadline:
                raise
            print(f"{error}; trying again in {pause:.0f} s", file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(2 * pause, MAX_PAUSE_SECONDS)


def submitted_from(folder: Path) -> set[str]:
    """Return the ids of this user's jobs and arrays whose script lies in `folder`. Raises SlurmError if squeue fails.

    An element of an array that has started has another id besides (%A in place of %F), which nothing records.
    """
    lines = command("squeue", "--noheader", "--states=all", "--format=%F|%o", "--me").splitlines()
    return {job for job, _, script in (line.partition("|") for line in lines) if Path(script).parent == folder}


def states(executor: str, jobs: Sequence[str]) -> dict[str, JobState]:
    """Return the states by job id, such as `123` or `123_4`; jobs that Slurm does not know are left out.

    Raises SlurmUnavailableError if Slurm does not answer, SlurmError if squeue fails.
    """
    if executor == "local":
        return {job: JobState(state="RUNNING") for job in jobs if is_running(job)}
    array_ids = sorted({job.partition("_")[0] for job in jobs})
    if not array_ids:
        return {}
    states_by_job = parse(command("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T|%e|%r", "--me"))
    if missing := sorted({job.partition("_")[0] for job in jobs if job not in states_by_job}):
        listing = ["--noheader", "--allocations", "--parsable2", "--format=JobID,State,End,Reason"]
        try:
            states_by_job = parse(command("sacct", *listing, f"--jobs={','.join(missing)}")) | states_by_job
        except SlurmUnavailableError:
            raise
        except SlurmError as error:
            if not NO_ACCOUNTING.search(str(error)):  # without accounting, only squeue knows of jobs
                raise
    wanted = set(jobs)
    return {job: state for job, state in states_by_job.items() if job in wanted}


def parse(listing: str) -> dict[str, JobState]:
    """Parse lines of `id|state|end|reason` into states by job id.

    sacct writes the state of a cancelled job as `CANCELLED by 0`, and pending array elements as `12_[3-5%2]`. Lines of
    job steps (`12.batch`) and of another form, such as warnings, are left out.
    """
    states_by_job = {}
    for line in listing.splitlines():
        parts = line.split("|", 3)
        if len(parts) < 4 or "." in parts[0]:
            continue
        job, state, end, reason = parts
        word = state.split(" ")[0].rstrip("+")  # a column that is too narrow ends in +
        for name in expand(job):
            states_by_job[name] = JobState(state=word, reason="" if reason == "None" else reason, end=parse_time(end))
    return states_by_job


def parse_time(text: str) -> float | None:
    """Return a local time such as `2026-01-31T08:00:00` in seconds since the epoch; None for any other text."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def expand(job: str) -> Iterable[str]:
    """Yield the ids of array elements; yield any other id unchanged.

    `12_[3-5,9,20-28:4%2]` are the elements 3, 4, 5, 9, 20, 24 and 28. An expression that was cut off ends in `...`.
    """
    match = re.fullmatch(r"([0-9]+)_\[([^%\]]*)(?:%[0-9]+)?\]?", job)
    if match is None:
        yield job
        return
    for part in match[2].split(","):
        if bounds := re.fullmatch(r"([0-9]+)(?:-([0-9]+)(?::([0-9]+))?)?", part):
            first, last, step = int(bounds[1]), int(bounds[2] or bounds[1]), int(bounds[3] or 1)
            yield from (f"{match[1]}_{index}" for index in range(first, last + 1, step))


def is_running(job: str) -> bool:
    """Return whether the process of a local job is running; it must be one that submitit started."""
    with suppress(OSError):
        status = Path(f"/proc/{job}/stat").read_text().rpartition(")")[2].split()[0]
        words = Path(f"/proc/{job}/cmdline").read_bytes()
        return status != "Z" and (not words or b"submitit" in words)  # empty until a new process calls exec
    return False


def cancel(executor: str, jobs: Sequence[str]) -> None:
    """Cancel pending and running jobs. Raises SlurmError if scancel fails."""
    if executor == "local":
        for job in filter(is_running, jobs):
            with suppress(ProcessLookupError):
                os.kill(int(job), signal.SIGTERM)
    elif jobs:
        command("scancel", *sorted({job for job in jobs}))


def requeue(job: str) -> None:
    """Requeue a running job, whose tasks Slurm then terminates. Raises SlurmError if scontrol fails."""
    command("scontrol", "requeue", job)


def requeue_without(job: str, nodes: str) -> None:
    """Requeue a running job so that it does not start again on some nodes, a comma-separated list.

    Slurm lets only pending jobs change their nodes. Raises SlurmError, with the job cancelled, if it refuses that.
    """
    requeue(job)
    try:
        patiently(lambda: command("scontrol", "update", f"jobid={job}", f"excnodelist={nodes}"))
    except SlurmError:
        command("scancel", job)
        raise
