"""Cancel the jobs of a run.

Only its pending and running jobs; data that is complete stays, and `retry` submits the rest again.
"""

from jobs.commands.options import Command, RunOptions
from jobs.state import run as runs
from slurm import commands


def run(options: RunOptions) -> int:
    cancelled = runs.find(runs.home(options.home), options.run)
    elements = runs.elements(cancelled).values()
    active = {element.job for element in elements if element.state in ("pending", "running")}
    commands.cancel(cancelled.executor, sorted({job.partition("_")[0] for job in active}))
    print(f"cancelled {len(active)} jobs of {cancelled.folder}")
    print(f"next: python -m jobs.launch retry {cancelled.folder.name}")
    return 0


COMMAND = Command(RunOptions, run)
