"""Register the EMA weights of a checkpoint as a model version in MLflow.

The checkpoint's lineage is attached to the version as a page. Releasing the same weights again adds no version.
"""

from dataclasses import dataclass

from jobs.commands.options import Command, CommonOptions, argument, option
from jobs.state import run as runs
from jobs.tracking import hub, model_registry


@dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    """The options of `release`."""

    checkpoint: str = argument("CHECKPOINT", help="Checkpoint directory or run folder.")
    name: str = option(
        "--name", metavar="NAME", default="pixart", help="Name of the registered model (default: pixart)."
    )
    push_to_hub: str | None = option(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="Private repository of a model hub (HF_ENDPOINT, HF_TOKEN) to upload the exported pipeline to, with its "
        "model card (default: none).",
    )


def run(options: Options) -> int:
    home = runs.home(options.home)
    checkpoint = runs.run_folder(home, options.checkpoint)
    if options.push_to_hub:
        hub.check_repository(options.push_to_hub)
    print(model_registry.release(home, checkpoint, options.name), flush=True)
    if options.push_to_hub:
        print(f"pushed: {hub.push(checkpoint, options.push_to_hub)}")
    return 0


COMMAND = Command(Options, run)
