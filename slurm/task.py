"""Wrapper of every task on a node: it records attempts and handles the signals that precede the end of a job.

Slurm sends SIGUSR2 ahead of the time limit, and SIGTERM on preemption, cancellation and the loss of a node. A
cooperative task polls `stop_level` and ends by itself; any other task is interrupted at once.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any

import submitit

from slurm import commands

ATTEMPTS = "attempts.jsonl"
RESULT = "result.json"
REQUEUES = 5  # limit for tasks that are not cooperative, since a shard may never fit into the time limit
KILL_SECONDS = 120  # longest wait for Slurm to terminate a requeued task
TERMINATED = 128 + signal.SIGTERM
END, TIME_IS_UP = 1, 2
LEVELS: dict[int, int] = {signal.SIGTERM: END, signal.SIGUSR2: TIME_IS_UP}

_asked = 0


class Left(BaseException):
    """A task was interrupted by a signal of the cluster.

    Derives from BaseException, so that handlers of errors do not catch it.
    """

    def __init__(self, level: int) -> None:
        super().__init__("left because " + ("the time is up" if level == TIME_IS_UP else "the job is to end"))
        self.level = level


def stop_level() -> int:
    """Return what the last signal asked of this process: 0 for nothing, END or TIME_IS_UP.

    Ranks have to agree on the maximum of their levels, since a signal may reach them at different times.
    """
    return _asked


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A callable that runs `function` on a node, for the run in folder `run`.

    With `ranks`, the result of rank 0 is written to the folder as JSON. With `cooperative`, the function polls
    `stop_level` and raises Left after it has saved; otherwise a signal raises Left at once.
    """

    function: Callable[..., Any]
    run: str
    ranks: bool = False
    cooperative: bool = False

    def __call__(self, *arguments: Any) -> Any:
        environment = submitit.JobEnvironment()
        environment.paths.result_pickle.unlink(missing_ok=True)  # left by an earlier attempt
        self.record(environment, arguments)
        for number in LEVELS:
            signal.signal(number, self.note if self.cooperative else self.leave)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)
        try:
            result = self.function(*arguments)
        except Left as left:
            print(left, file=sys.stderr, flush=True)
            if left.level == TIME_IS_UP and "SLURM_JOB_ID" in os.environ:
                self.come_back(environment)
            sys.exit(TERMINATED)
        if self.ranks and environment.global_rank == 0:
            target = Path(self.run) / RESULT
            temporary = target.with_suffix(".part")
            temporary.write_text(json.dumps(result) + "\n")
            temporary.replace(target)
        return result

    def record(self, environment: submitit.JobEnvironment, arguments: tuple[Any, ...]) -> None:
        """Append a line about this start of this rank to the run's attempts."""
        line = {
            "job": environment.job_id,
            "rank": environment.global_rank,
            "restart": restart_count(),
            "arguments": list(arguments),
            "node": os.environ.get("SLURMD_NODENAME", environment.hostname),
            "time": datetime.now().isoformat(timespec="seconds"),
        }
        with (Path(self.run) / ATTEMPTS).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def note(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal of a cooperative task: set the stop level."""
        global _asked
        _asked = LEVELS[number]

    def leave(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal of any other task: raise Left, and ignore further signals."""
        self.note(number, frame)
        for handled in LEVELS:
            signal.signal(handled, signal.SIG_IGN)
        raise Left(_asked)

    def come_back(self, environment: submitit.JobEnvironment) -> None:
        """Requeue this job by rank 0, and wait on all ranks: with --kill-on-bad-exit a rank that exits ends the others.

        Raises RuntimeError if the time limit was reached too often.
        """
        if not self.cooperative and restart_count() >= REQUEUES:
            raise RuntimeError(f"the time limit was reached {REQUEUES + 1} times: give the job more, or smaller shards")
        if environment.global_rank == 0:
            commands.requeue(environment.job_id)
        time.sleep(KILL_SECONDS)


def restart_count() -> int:
    """Return how often Slurm has requeued this job."""
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def attempts(run: str | Path) -> list[dict[str, Any]]:
    """Return the records of all starts of all ranks, in order, without lines that a network file system has damaged."""
    try:
        lines = (Path(run) / ATTEMPTS).read_text().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found
