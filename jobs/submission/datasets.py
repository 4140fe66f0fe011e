"""The dataset that a command works on: found, or made now, and held against what the command asks for."""

import functools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from jobs.state import ledger
from jobs.state import run as runs
from jobs.state.json_record import of_this_version
from jobs.state.run import Run
from jobs.submission.launch import Launch
from jobs.submission.wait import POLL_SECONDS
from jobs.tasks import init_dataset
from pixart.config.dataset import data_from_dict, is_url
from pixart.config.recipe import to_json
from slurm import commands
from slurm import profile as profiles
from slurm.executor import Cluster, Shape


def use_dataset(launch: Launch, assignments: Sequence[str]) -> dict[str, Any]:
    """The dataset's manifest, made now if it is not there; `launch.recipe` then says what it was made with.

    Raises ValueError where the recipe asks for another dataset than the one that is there.
    """
    manifest = ledger.manifest(launch.dataset)
    if manifest is None and launch.dry_run:
        return {"data": asdict(launch.recipe.data), "class_names": []}
    if manifest is None and is_url(launch.dataset):
        raise ValueError(f"dataset {launch.dataset}: there is none")
    if manifest is None:
        check_own_folder(launch.dataset)
        make_dataset(launch)
        manifest = ledger.manifest(launch.dataset)
        assert manifest is not None
    with of_this_version(f"{launch.dataset}/{ledger.MANIFEST}"):
        made = data_from_dict(manifest["data"])
    named = {
        assignment.split("=")[0].removeprefix("data.") for assignment in assignments if assignment.startswith("data.")
    }
    for name in sorted(named - {"path"}):
        had, asked = (attrgetter(name)(data) for data in (made, launch.recipe.data))
        if had != asked:
            raise ValueError(
                f"data.{name}={asked!r}: the dataset {launch.dataset} was made with {had!r}; name another by data.path"
            )
    launch.recipe = replace(launch.recipe, data=replace(made, path=launch.dataset))
    return manifest


def check_own_folder(dataset: str) -> None:
    """Raises ValueError where a new dataset would lie among files of others, such as the images themselves."""
    there = sorted(Path(dataset).iterdir()) if Path(dataset).is_dir() else []
    others = [path.name for path in there if path.name != ledger.ARRAYS and not path.name.startswith(".")]
    if others:
        raise ValueError(
            f"dataset {dataset}: is no dataset, and has files of others, such as {others[0]}; name a new folder, and "
            "images by --set data.source=FOLDER"
        )


def make_dataset(launch: Launch) -> None:
    """Runs the init job on this machine: it only looks at the source and writes one small file."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cluster = Cluster(profiles.load("local"), folder)
        job = cluster.submit_ranks(Shape(kind="init"), functools.partial(init_dataset.run, to_json(launch.recipe)))
        run = Run(folder=folder, kind="init", executor="local", dataset=launch.dataset, total=1, nodes=1).added([job])
        try:
            while runs.under_way(found := runs.elements(run)):
                time.sleep(POLL_SECONDS["local"] / 5)
        except KeyboardInterrupt:
            commands.cancel(run.executor, run.job_ids)
            raise
        if found[0].state == "failed":  # by the source, a model, or the place: there is no log to point to any more
            kind, _, said = found[0].note.partition(": ")
            raise ValueError(said if kind == "ValueError" else f"dataset {launch.dataset} cannot be made: {said}")
