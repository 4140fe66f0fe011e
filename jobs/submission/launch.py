"""State and exceptions that the submissions of a command share."""

import functools
from dataclasses import dataclass, field
from pathlib import Path

from jobs.tracking.mlflow_store import Tracker
from jobs.tracking.sync import try_sync
from pixart.config.recipe import Recipe
from slurm.profile import Profile


class JobFailedError(Exception):
    """A job ended without a result; the message names the job and its log."""


class NothingSubmitted(Exception):  # noqa: N818 - the regular end of a dry run
    """A dry run is complete; the message is what would have been submitted."""


@dataclass(kw_only=True)
class Launch:
    """State that all submissions of one command share."""

    home: Path
    command: str  # name of the command, such as train
    recipe: Recipe
    profile: Profile
    overrides: tuple[str, ...] = ()  # assignments of configuration keys that the user gave
    submission: Path | None = None  # folder of the submission that the runs belong to
    per_task: int | None = None  # shards per task of an array; None: by the size of the shards
    wait: bool = True
    dry_run: bool = False
    report: str | None = None  # tracker beside MLflow
    folders: list[Path] = field(default_factory=list)  # folders of all runs that were submitted
    mlflow_stale: bool = False  # MLflow did not take the last update

    @functools.cached_property
    def tracker(self) -> Tracker:
        return Tracker(self.home)

    @property
    def dataset(self) -> str:
        return self.recipe.data.path


def sync_run(launch: Launch, folder: Path) -> None:
    """Send a run to MLflow if the launcher waits for it; otherwise a background process does."""
    if launch.wait:
        launch.mlflow_stale = not try_sync(launch.tracker, folder)
