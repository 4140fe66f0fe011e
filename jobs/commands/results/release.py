"""Register the EMA weights of a checkpoint as a model version in MLflow.

The checkpoint's lineage is attached to the version as a page. Releasing the same weights again adds no version.
"""

from dataclasses import dataclass

from jobs.commands.options import Command, CommonOptions, argument, option
from jobs.state import run as runs
from jobs.tracking import model_registry


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """The options of `release`."""

    checkpoint: str = argument("CHECKPOINT", help="Checkpoint directory or run folder.")
    name: str = option(
        "--name", metavar="NAME", default="pixart", help="Name of the registered model (default: pixart)."
    )


def run(options: Options) -> int:
    home = runs.home(options.home)
    print(model_registry.release(home, runs.run_folder(home, options.checkpoint), options.name))
    return 0


COMMAND = Command(Options, run)
