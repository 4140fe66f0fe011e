"""Queries and control of jobs by Slurm's commands: squeue, sacct (if there is accounting), sinfo, scontrol and scancel.

Jobs of the local executor are processes, whose state is read from /proc.
"""

import os
import re
import signal
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

COMMAND_TIMEOUT_SECONDS = 60
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
        kind = SlurmUnavailableError if NO_ANSWER.search(process.stderr) else SlurmError
        raise kind(f"{words[0]}: {lines[-1]}")
    return process.stdout


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """Limits of a Slurm partition."""

    minutes: int | None  # time limit of a job; None: no limit
    nodes: int
    gpus_per_node: int  # maximum over the nodes


def partition(name: str | None) -> Partition:
    """Return the limits of a partition, or of the default partition if `name` is None.

    Of a list such as `main,urgent`, of which Slurm takes the one that starts the job first, these are the most generous
    limits. Raises SlurmError if one does not exist.
    """
    listing = command("sinfo", "--noheader", "--all", "--Node", "--format=%P|%l|%N|%G")  # with hidden partitions
    rows = [line.split("|", 3) for line in listing.splitlines()]
    names = sorted({row[0].rstrip("*") for row in rows})
    wanted = name.split(",") if name else []
    if unknown := [item for item in wanted if item not in names]:
        raise SlurmError(
            f"partition {unknown[0]!r}: no such partition on this cluster; it must be one of {', '.join(names)}"
        )
    matching = [row for row in rows if (row[0].rstrip("*") in wanted if wanted else row[0].endswith("*"))]
    if not matching:
        raise SlurmError("partition: the cluster has no default partition; set `partition` in the profile")
    gpus = [sum(int(count) for count in re.findall(r"gpu(?::[^:,(]+)?:([0-9]+)", row[3])) for row in matching]
    minutes = [parse_minutes(row[1]) for row in matching]
    return Partition(
        minutes=None if None in minutes else max(limit for limit in minutes if limit is not None),
        nodes=max(len({row[2] for row in matching if row[0] == title}) for title in {row[0] for row in matching}),
        gpus_per_node=max(gpus),
    )


def parse_minutes(text: str) -> int | None:
    """Return the whole minutes of a time limit in Slurm's notation; None for `infinite`.

    The forms are `days-hours:minutes:seconds`, `hours:minutes:seconds` and `minutes:seconds`.
    """
    if text == "infinite":
        return None
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    hours, minutes = (parts[0], parts[1]) if len(parts) == 3 else (0, parts[0])
    return int(days or 0) * 24 * 60 + hours * 60 + minutes


def max_array_size() -> int:
    """Return Slurm's MaxArraySize, which limits the elements of one array. Raises SlurmError if scontrol fails."""
    match = re.search(r"^MaxArraySize\s*=\s*([0-9]+)", command("scontrol", "show", "config"), re.MULTILINE)
    return int(match[1]) if match else 1001
