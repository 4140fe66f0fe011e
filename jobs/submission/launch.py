"""What every submission of one command shares."""

import functools
from dataclasses import dataclass, field
from pathlib import Path

from jobs.tracking.mlflow_store import Tracker
from jobs.tracking.sync import try_publish
from pixart.config.recipe import Recipe
from slurm.profile import Profile


class JobFailedError(Exception):
    """A job ended without its result; the message names it and its log."""


class NothingSubmitted(Exception):  # noqa: N818 - no error
    """A dry run has come to its end; the message is what would have been submitted."""


@dataclass(kw_only=True)
class Launch:
    """What every submission of one command shares."""

    home: Path
    job: str  # the command's name
    recipe: Recipe
    profile: Profile
    submission: Path | None = None  # folder of what this command's runs belong to
    wait: bool = True
    dry_run: bool = False
    folders: list[Path] = field(default_factory=list)  # of all runs that it has begun
    untold: bool = False  # whether MLflow has not taken something

    @functools.cached_property
    def tracker(self) -> Tracker:
        return Tracker(self.home)

    @property
    def dataset(self) -> str:
        return self.recipe.data.path


def tell(launch: Launch, folder: Path) -> None:
    """Where the launcher waits, MLflow has a run before its first task starts; else a process in the background sees
    to it."""
    if launch.wait:
        launch.untold = not try_publish(launch.tracker, folder)
