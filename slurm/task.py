"""Wrapper of every task on a node: it records attempts and handles the signals that Slurm sends before it ends a job.

Slurm sends SIGUSR2 ahead of the time limit, and SIGTERM on preemption, cancellation and the loss of a node. A
cooperative task polls `stop_level` and ends by itself; any other task is interrupted at once.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, TypedDict

import submitit

from slurm import commands
from slurm.usage import Meter, read_lines

ATTEMPTS = "attempts.jsonl"
RESULT = "result.json"
MAX_REQUEUES = 5  # for tasks that are not cooperative, since a shard may never fit into the time limit
REQUEUE_TIMEOUT_SECONDS = 120  # for Slurm to terminate a requeued task
TERMINATED_EXIT_CODE = 128 + signal.SIGTERM
INTERRUPTED = "interrupted: "  # begins the last line of the log of a task that a signal ended
TERMINATE, TIME_LIMIT = 1, 2
STOP_LEVELS: dict[int, int] = {signal.SIGTERM: TERMINATE, signal.SIGUSR2: TIME_LIMIT}


class Attempt(TypedDict):
    """A start of one rank of a job."""

    job: str
    rank: int
    restart: int
    arguments: list[Any]
    node: str
    time: str


_stop_level = 0


class TaskInterrupted(BaseException):
    """A task was interrupted by a signal of the cluster.

    Derives from BaseException, so that handlers of errors do not catch it.
    """

    def __init__(self, level: int, *, exclude: str | None = None) -> None:
        reason = "the time limit is near" if level == TIME_LIMIT else "the job is being terminated"
        super().__init__(f"{INTERRUPTED}{f'the job will avoid {exclude}' if exclude else reason}")
        self.level, self.exclude = level, exclude  # comma-separated nodes that the job is requeued without


def stop_level() -> int:
    """Return the stop level that the last signal requested: 0 (none), TERMINATE or TIME_LIMIT.

    Ranks must reduce their levels to the maximum, since a signal may reach them at different times.
    """
    return _stop_level


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A callable that runs `function` on a node, for the run in folder `run`.

    With `ranks`, the result of rank 0 is written to the folder as JSON. With `cooperative`, the function polls
    `stop_level` and raises TaskInterrupted after it has saved; otherwise a signal raises TaskInterrupted at once.
    """

    function: Callable[..., Any]
    run: str
    ranks: bool = False
    cooperative: bool = False

    def __call__(self, *arguments: Any) -> Any:
        environment, meter = submitit.JobEnvironment(), Meter()
        environment.paths.result_pickle.unlink(missing_ok=True)  # left by an earlier attempt
        identity = self.record(environment, arguments)
        for number in STOP_LEVELS:
            signal.signal(number, self.set_stop_level if self.cooperative else self.interrupt)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        try:
            try:
                result = self.function(*arguments)
            finally:
                meter.record(Path(self.run), **identity)
        except TaskInterrupted as interrupted:
            print(interrupted, file=sys.stderr, flush=True)
            if (interrupted.level == TIME_LIMIT or interrupted.exclude) and "SLURM_JOB_ID" in os.environ:
                self.requeue(environment, interrupted.exclude)
            sys.exit(TERMINATED_EXIT_CODE)
        if self.ranks and environment.global_rank == 0:
            target = Path(self.run) / RESULT
            temporary = target.with_suffix(".part")
            temporary.write_text(json.dumps(result) + "\n")
            temporary.replace(target)
        return result

    def record(self, environment: submitit.JobEnvironment, arguments: tuple[Any, ...]) -> dict[str, Any]:
        """Append a line about this start of this rank to the run's attempts, and return what identifies the rank."""
        identity = {
            "job": environment.job_id,
            "rank": environment.global_rank,
            "restart": restart_count(),
            "node": os.environ.get("SLURMD_NODENAME", environment.hostname),
        }
        line = {
            **identity,
            "arguments": list(arguments),
            "time": datetime.now().astimezone().isoformat(timespec="milliseconds"),
        }
        with (Path(self.run) / ATTEMPTS).open("a") as file:
            file.write(json.dumps(line) + "\n")
        return identity

    def set_stop_level(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal of a cooperative task: set the stop level."""
        global _stop_level
        _stop_level = STOP_LEVELS[number]

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal of any other task: raise TaskInterrupted, and ignore further signals."""
        self.set_stop_level(number, frame)
        for handled in STOP_LEVELS:
            signal.signal(handled, signal.SIG_IGN)
        raise TaskInterrupted(_stop_level)

    def requeue(self, environment: submitit.JobEnvironment, exclude: str | None = None) -> None:
        """Requeue this job by rank 0, and wait on all ranks: with --kill-on-bad-exit a rank that exits ends the others.

        `exclude` are the nodes that it avoids then. Raises RuntimeError if the time limit was reached too often.
        """
        if not self.cooperative and restart_count() >= MAX_REQUEUES:
            raise RuntimeError(
                f"the time limit was reached {MAX_REQUEUES + 1} times; raise `minutes` in the profile, or split shards"
            )
        if environment.global_rank == 0 and exclude:
            for number in STOP_LEVELS:  # Slurm terminates the job, and with it scontrol, before its nodes are changed
                signal.signal(number, signal.SIG_IGN)
            commands.requeue_without(environment.job_id, exclude)
        elif environment.global_rank == 0:
            commands.requeue(environment.job_id)
        time.sleep(REQUEUE_TIMEOUT_SECONDS)


def restart_count() -> int:
    """Return how often Slurm has requeued this job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def attempts(run: str | Path) -> list[Attempt]:
    """Return the records of all starts of all ranks in order."""
    return read_lines(Path(run) / ATTEMPTS, Attempt)
