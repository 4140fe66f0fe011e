"""The train job: one rank of a training run."""

from jobs.tracking import Journal
from pixart.config import from_json


def run(recipe: str, stage: int, run_folder: str, start: str | None) -> str:
    """Called on every rank; returns the last checkpoint's directory."""
    from submitit.helpers import TorchDistributedEnvironment

    TorchDistributedEnvironment().export(set_cuda_visible_devices=False)

    from pixart.training.loop import train

    configuration = from_json(recipe)
    last = train(
        stage=stage,
        model=configuration.model,
        config=configuration.train(stage),
        dataset=configuration.data.path,
        run=run_folder,
        start=start,
        report=Journal(run_folder).metrics,
    )
    return str(last)
