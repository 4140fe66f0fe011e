"""Many tasks that only report metrics, as separate processes.

    python -m tests.support.reporting_tasks RUN TASKS STEPS KILLS

All start at the same time. Randomly chosen active tasks are killed, one after the other, and restarted from their last
checkpoint, as after a requeue, until KILLS tasks were killed. A task's metrics depend on its number and step.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

from jobs.state.journal import Journal, read_journal

CHECKPOINT_STEPS = 5  # steps between two checkpoints
STEP_SECONDS = 0.1  # seconds per step


def metrics(task: int, step: int) -> dict[str, float]:
    """Return the metrics of a task at a step."""
    return {f"task/{task:03d}": 1 / (1 + step), f"data/valid_{task % 4}": task + step / 1000}


def point_step(task: int, step: int) -> int:
    """Return the step of a task's point, unique in the run: tasks share metrics but not steps."""
    return task * 1000 + step


def expected(tasks: int, steps: int) -> dict[tuple[str, int], float]:
    """Return all points of an undisturbed run, by key and step."""
    return {
        (key, point_step(task, step)): value
        for task in range(tasks)
        for step in range(steps)
        for key, value in metrics(task, step).items()
    }


def work(run: Path, task: int, steps: int, begin: int) -> None:
    journal = Journal(run)
    for step in range(begin, steps):
        journal.metrics(point_step(task, step), metrics(task, step))
        time.sleep(STEP_SECONDS)


def last_step(run: Path, task: int) -> int:
    """Return the last step that a task has reported, or 0."""
    lines, _ = read_journal(run)
    steps = [line["step"] % 1000 for line in lines if line["step"] // 1000 == task]
    return max(steps, default=0)


def start(run: Path, task: int, steps: int, barrier: tuple[int, int] | None = None) -> int:
    """Fork a task and return its process ID; with the pipe `barrier`, it waits until the parent closes the pipe."""
    child = os.fork()
    if not child:
        if barrier:
            os.close(barrier[1])
            os.read(barrier[0], 1)  # blocks until the parent closes the other end
        work(run, task, steps, 0 if barrier else last_step(run, task) // CHECKPOINT_STEPS * CHECKPOINT_STEPS)
        os._exit(0)
    return child


def main(run: Path, tasks: int, steps: int, kills: int) -> None:
    chance, barrier = random.Random(0), os.pipe()
    children = {start(run, task, steps, barrier): task for task in range(tasks)}
    os.close(barrier[1])
    killed = 0
    while children:
        chosen = -1
        if killed < kills:
            time.sleep(chance.uniform(0, STEP_SECONDS / 4))
            chosen = chance.choice(list(children))
            os.kill(chosen, signal.SIGKILL)
        child, status = os.waitpid(chosen, 0)
        task = children.pop(child)
        if status:
            killed += 1
            children[start(run, task, steps)] = task
    print(f"{tasks} tasks done, {killed} kills")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
