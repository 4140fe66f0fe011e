"""Cancel the jobs of a run.

Cancels the pending and running jobs of the run. Complete data is kept; `retry` submits the other elements again.
"""

from jobs.commands.hints import next_command
from jobs.commands.options import Command, RunOptions
from jobs.state import run as runs
from slurm import commands


def run(options: RunOptions) -> int:
    cancelled = runs.find(runs.home(options.home), options.run)
    elements = runs.elements(cancelled).values()
    active = {element.job for element in elements if element.state in runs.ACTIVE}
    commands.cancel(cancelled.executor, sorted({job.partition("_")[0] for job in active}))
    print(f"cancelled {len(active)} jobs of {cancelled.folder}")
    print(f"next: {next_command(options, 'retry', cancelled.folder.name)}")
    return 0


COMMAND = Command(RunOptions, run)
