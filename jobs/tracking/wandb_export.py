"""Weights & Biases beside MLflow: a run's journal as an offline run of the `wandb` package.

The offline run is a function of the run folder: each export writes it anew, under the same id, so that kills, requeues
and repeated steps give the curves that MLflow has. `wandb sync` uploads it from a machine with a connection; with
WANDB_MODE=online the export does.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jobs.state.journal import points, read_journal
from jobs.state.run_metadata import read_description, status_of, work_times
from jobs.tracking.mlflow_entities import CONFIGURATION, mlflow_key

NAME = "wandb"  # of the report, and of the folder in the run's that the package writes
PROJECT = "pixart"
STEP, SECONDS = "step", "system/seconds"  # horizontal axes: of the journal's steps, and of system metrics


def export(run: Path) -> Path | None:
    """Write a run as an offline run of wandb and return its folder; None before its work has begun.

    Raises ValueError if the package is not installed.
    """
    begin, _ = work_times(run)
    if begin is None:
        return None
    try:
        import wandb
    except ModuleNotFoundError:
        raise ValueError("--report wandb: the package wandb is not installed; install the extra 'wandb'") from None
    for earlier in (run / NAME).glob("offline-run-*"):
        shutil.rmtree(earlier)
    description = read_description(run)
    parent = Path(description["parent"]).name if description["parent"] else None
    settings = wandb.Settings(console="off", silent=True, x_disable_stats=True, x_save_requirements=False)
    session = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=description["key"],
        name=run.name,
        group=parent,
        job_type=description["tags"].get("pixart.job"),
        config={**configuration(run), **description["parameters"]},
        dir=str(run),
        mode="online" if os.environ.get("WANDB_MODE") == "online" else "offline",
        settings=settings,
    )
    session.define_metric("*", step_metric=STEP)
    session.define_metric("system/*", step_metric=SECONDS)
    for row in rows(run):
        session.log(row)
    session.summary["queue_seconds"] = max(0.0, begin - description["begun"])
    folder = Path(session.dir).parent
    session.finish(exit_code=int(status_of(run) == "FAILED"))
    wandb.teardown()  # returns when its service has written the file
    return folder


def configuration(run: Path) -> dict[str, Any]:
    """Return the recipe of a run; empty if the folder has none."""
    path = run / CONFIGURATION
    return json.loads(path.read_bytes()) if path.exists() else {}


def rows(run: Path) -> Iterator[dict[str, float]]:
    """Yield the metrics of a run, those of one step in one row, in the order of the steps.

    System metrics, whose steps are seconds, have rows of their own; a step that was repeated after a requeue counts
    once, as in MLflow.
    """
    grouped: dict[tuple[bool, int], dict[str, float]] = {}
    for key, value, moment, step in points(read_journal(run)[0], set()):
        name = mlflow_key(key)
        is_system = name.startswith("system/")
        axis = SECONDS if is_system else STEP
        row = grouped.setdefault((is_system, step), {axis: step, "_timestamp": moment})
        row[name] = value
    for _, row in sorted(grouped.items()):
        yield row
