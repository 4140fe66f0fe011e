"""Register the EMA weights of a checkpoint as a model version in MLflow.

The version has the checkpoint's lineage as a page. The same weights are one version, however often they are released.
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
    print(model_registry.release(runs.home(options.home), options.checkpoint, options.name))
    return 0


COMMAND = Command(Options, run)
