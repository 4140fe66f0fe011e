"""What runs on a node around every job: attempts are recorded, and signals that ask for the node back are heeded.

USR2 comes ahead of the time limit, TERM with a preemption, a cancelled job or a node that goes away. A task that does
not look at `stop_level` is left at once, wherever it is; one that does ends in its own time.
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
REQUEUES = 5  # of a task that is left at once: a shard that never fits into the time limit must end some day
KILL_SECONDS = 120  # that Slurm is given to end a task that it has requeued
TERMINATED = 128 + signal.SIGTERM
END, TIME_IS_UP = 1, 2
LEVELS: dict[int, int] = {signal.SIGTERM: END, signal.SIGUSR2: TIME_IS_UP}

_asked = 0


class Left(BaseException):
    """The work was left because the cluster asked; no Exception, so that no handler of errors takes it for one."""

    def __init__(self, level: int) -> None:
        super().__init__("left because " + ("the time is up" if level == TIME_IS_UP else "the job is to end"))
        self.level = level


def stop_level() -> int:
    """0, END or TIME_IS_UP: what the cluster has asked of this process; ranks have to agree on their maximum."""
    return _asked


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Calls `function` on a node for the run in folder `run`.

    With `ranks`, rank 0's result is written to the folder as JSON. With `cooperative`, the function looks at
    `stop_level` and raises Left itself, once it has saved.
    """

    function: Callable[..., Any]
    run: str
    ranks: bool = False
    cooperative: bool = False

    def __call__(self, *arguments: Any) -> Any:
        environment = submitit.JobEnvironment()
        environment.paths.result_pickle.unlink(missing_ok=True)  # of an attempt before this
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
        """One line for each start of each rank."""
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
        global _asked
        _asked = LEVELS[number]

    def leave(self, number: int, frame: FrameType | None) -> None:
        self.note(number, frame)
        for handled in LEVELS:
            signal.signal(handled, signal.SIG_IGN)  # once is enough
        raise Left(_asked)

    def come_back(self, environment: submitit.JobEnvironment) -> None:
        """Requeues this job, by one rank, and waits for its end: a rank that exits would end the others first."""
        if not self.cooperative and restart_count() >= REQUEUES:
            raise RuntimeError(f"the time limit was reached {REQUEUES + 1} times: give the job more, or smaller shards")
        if environment.global_rank == 0:
            commands.requeue(environment.job_id)
        time.sleep(KILL_SECONDS)


def restart_count() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT", 0))


def attempts(run: str | Path) -> list[dict[str, Any]]:
    """Every start of every rank, in order; without a line that a network file system has torn."""
    try:
        lines = (Path(run) / ATTEMPTS).read_text().splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found
