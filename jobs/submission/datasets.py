"""Open the dataset that a command works on, or create it, and compare it with the command's configuration."""

import functools
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from jobs.state import ledger
from jobs.state import run as runs
from jobs.state.run import Run
from jobs.submission.launch import Launch
from jobs.submission.wait import LOCAL_POLL_SECONDS
from jobs.tasks import init_dataset
from pixart.config.dataset import data_from_dict, is_url
from pixart.config.recipe import to_json
from slurm import commands
from slurm import profile as profiles
from slurm.executor import Cluster
from slurm.sbatch import Shape

WATCH_SECONDS = 1.0  # between looks at the launcher
GRACE_SECONDS = 10.0  # for an init job to remove its files when the launcher has ended


def open_dataset(launch: Launch, create: Callable[[], None] | None = None) -> dict[str, Any]:
    """Return the dataset's manifest, and set the recipe's `data` to it; create the dataset if it does not exist.

    `create` is the function of the init job that does so (default: the one for a source of images). Raises ValueError
    if an override asks for another value than the dataset was created with.
    """
    manifest = ledger.manifest(launch.dataset)
    if manifest is None and launch.dry_run:
        return {"data": asdict(launch.recipe.data), "class_names": []}
    if manifest is None and is_url(launch.dataset):
        raise ValueError(f"dataset {launch.dataset} does not exist; create it on a file system, and copy it there")
    if manifest is None:
        check_new_folder(launch.dataset)
        create_dataset(launch, create or functools.partial(init_dataset.run, to_json(launch.recipe)))
        manifest = ledger.manifest(launch.dataset)
        assert manifest is not None
    stored = data_from_dict(manifest["data"])
    keys = {item.split("=")[0].removeprefix("data.") for item in launch.overrides if item.startswith("data.")}
    for key in sorted(keys - {"path"}):
        expected, actual = (attrgetter(key)(data) for data in (stored, launch.recipe.data))
        if actual != expected:
            raise ValueError(
                f"data.{key}={actual!r}: the dataset {launch.dataset} was created with {expected!r}; "
                "name another dataset by --dataset"
            )
    launch.recipe = replace(launch.recipe, data=replace(stored, path=launch.dataset))
    return manifest


def check_new_folder(dataset: str) -> None:
    """Check the folder of a new dataset. Raises ValueError if it holds other files, such as the source images."""
    paths = sorted(Path(dataset).iterdir()) if Path(dataset).is_dir() else []
    others = [path.name for path in paths if path.name != ledger.ARRAYS and not path.name.startswith(".")]
    if others:
        raise ValueError(
            f"dataset {dataset}: the folder is not a dataset and holds other files, such as {others[0]}; name a new "
            "folder, and the images by --set data.source=FOLDER"
        )


def while_alive(launcher: int, create: Callable[[], None]) -> None:
    """Run `create`, and end this process when the launcher has ended: nobody would use the listing of a long source."""

    def watch() -> None:
        while not has_ended(launcher):
            time.sleep(WATCH_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)  # removes temporary files
        time.sleep(GRACE_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    create()


def has_ended(pid: int) -> bool:
    """Return whether a process of this machine has ended, though its parent may not have noticed."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True
    return status.rpartition(")")[2].split()[0] in "ZX"


def create_dataset(launch: Launch, create: Callable[[], None]) -> None:
    """Run the init job on this machine: it lists the source and writes one small file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cluster = Cluster(profiles.load("local"), folder)
        job = cluster.submit_ranks(Shape(kind="init"), functools.partial(while_alive, os.getpid(), create))
        run = Run(folder=folder, kind="init", executor="local", dataset=launch.dataset, total=1, nodes=1).added([job])
        try:
            while runs.is_active(elements := runs.elements(run)):
                time.sleep(LOCAL_POLL_SECONDS / 5)
        except KeyboardInterrupt:
            commands.cancel(run.executor, run.job_ids)
            raise
        if elements[0].state == "failed":  # the log is removed with the temporary folder
            kind, _, message = elements[0].note.partition(": ")
            if kind != "ValueError":
                message = f"dataset {launch.dataset} cannot be created: {message}"
            raise ValueError(message)
