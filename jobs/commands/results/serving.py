"""The serving job: its request, its submission, and waiting for its end."""

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jobs.reports import lineage, lineage_page
from jobs.state import endpoint as endpoints
from jobs.state import run as runs
from jobs.state.checkpoint_names import find_weights
from jobs.state.run import Run
from jobs.state.run_metadata import Status, set_status
from jobs.submission.launch import Launch, sync_run
from jobs.submission.submit import run_ranks
from jobs.submission.wait import poll, raise_first_failure
from jobs.tasks.serve import LINEAGE
from jobs.tracking.model_registry import released_checkpoint
from pixart.atomic import write_atomically
from slurm import commands
from slurm.executor import Cluster

KIND = "serve"
RELEASE = re.compile(r"models:/(?P<name>[^/@]+)(?:/(?P<version>[0-9]+)|@(?P<alias>.+))")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingRequest:
    """What to serve, and how; `limits` are fields of `pixart.serving.requests.Limits`."""

    checkpoint: Path
    weights: list[str]
    host: str
    port: int
    idle_minutes: float
    limits: dict[str, Any] = field(default_factory=dict)
    recaption_server: str | None = None
    recaption_model: str | None = None
    content_check: bool = False
    base_latent_size: int | None = None  # of a checkpoint that does not record it
    ignore_unknown: bool = False  # whether to read a checkpoint without parts that are not understood


def find_source(home: Path, name: str) -> tuple[Path, dict[str, Any] | None]:
    """Return the path and record of a checkpoint, as `find_weights`; also of a released model, `models:/NAME/VERSION`.

    Raises ValueError if it does not exist.
    """
    if not name.startswith("models:"):
        return find_weights(name)
    match = RELEASE.fullmatch(name)
    if not match:
        raise ValueError(f"{name}: no released model; give models:/NAME/VERSION or models:/NAME@ALIAS")
    return find_weights(released_checkpoint(home, match["name"], match["version"], match["alias"]))


def submit_serving(launch: Launch, request: ServingRequest) -> Run:
    """Submit the server, without waiting for its end."""
    pythons = launch.profile.python
    wait, launch.wait = launch.wait, False
    try:
        return run_ranks(
            launch,
            Cluster(launch.profile, launch.home).ranks_shape(KIND, 1, 1),
            {
                **asdict(request),
                "checkpoint": str(request.checkpoint),
                "recaption_python": pythons.get("recaption", pythons.get("caption", pythons.get(KIND))),
            },
            parameters={"checkpoint": str(request.checkpoint), "weights": " ".join(request.weights)},
            tags={"pixart.parent_checkpoint": str(request.checkpoint)},
            total=1,
        )
    finally:
        launch.wait = wait


def write_lineage(home: Path, run: Run, checkpoint: Path) -> None:
    """Write the page of the checkpoint's lineage into the run folder, which the server shows."""
    page = lineage_page.page(lineage.trace_checkpoint(home, checkpoint), run.folder)
    write_atomically(run.folder / LINEAGE, page)


def follow(launch: Launch, run: Run) -> str:
    """Print the address of the server once it is known, wait for its end, and return a line about it.

    An interrupt ends a server on this machine, which finishes what it has begun; one on a cluster continues. Raises
    ValueError or JobFailedError if it failed.
    """
    status: Status = "FAILED"
    is_local, shown = run.executor == "local", False
    try:
        for _ in poll(run, launch.profile.poll_seconds):
            endpoint = None if shown else endpoints.load(run.folder)
            if endpoint:
                print(endpoints.describe(endpoint, is_remote=not is_local), flush=True)
                shown = True
        raise_first_failure(run, runs.elements(run))
        status = "FINISHED"
    except KeyboardInterrupt:
        if not is_local:
            status = "RUNNING"
            raise
        commands.cancel(run.executor, run.job_ids)
        for _ in poll(run, launch.profile.poll_seconds):
            pass
        status = "FINISHED"
        return "ended: interrupted"
    finally:
        set_status(run.folder, status)
        sync_run(launch, run.folder)
    result = runs.result(run)
    return f"ended: {result['ended']}, after {result['images']} images"
