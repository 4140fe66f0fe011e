"""Run the whole pipeline on rendered scenes, and wait for its samples.

Runs the jobs of `pipeline` with the demo recipe, which takes a few minutes on two CPU cores.
"""

from jobs.commands.launching import launching, read_recipe
from jobs.commands.options import Command
from jobs.commands.training.pipeline import pipeline
from jobs.commands.training.train import TrainingOptions
from jobs.state import run as runs


def run(options: TrainingOptions) -> int:
    home = runs.home(options.home)
    recipe = read_recipe(home, options)
    with launching("demo", options, home, recipe, overrides=options.overrides, wait=True) as launch:
        print(pipeline(launch, options))
    return 0


COMMAND = Command(TrainingOptions, run)
