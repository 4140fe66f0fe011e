"""Common part of the commands that submit jobs: reading the recipe and the profile, and synchronizing the runs.

Imports no torch; only the jobs do.
"""

import json
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.commands.hints import next_command
from jobs.commands.options import DATASET_KEY, RecipeOptions, SubmissionOptions, check_report
from jobs.state import run as runs
from jobs.submission.launch import Launch, NothingSubmitted
from jobs.tracking.sync import sync_in_background
from pixart import records
from pixart.config.dataset import is_url
from pixart.config.keys.overrides import apply
from pixart.config.recipe import Recipe, from_json
from pixart.recipes import DEFAULT_RECIPE, RECIPES
from pixart.relocation import home_of, present
from slurm import profile as profiles
from slurm.profile import Profile

BUILT_IN = ("", "demo", "minilm")  # sources and models that are not files


@contextmanager
def launching(
    command: str,
    options: SubmissionOptions,
    home: Path,
    recipe: Recipe,
    *,
    overrides: tuple[str, ...] = (),
    profile: Profile | None = None,
    wait: bool = False,
) -> Iterator[Launch]:
    """Yield the launch of a command; if it does not wait, send its runs to MLflow from a background process afterwards.

    A dry run leaves the block at the first submission and prints the plan. Raises ValueError for an unknown cluster.
    """
    check_report(options.report)
    profile = profile or load_profile(options)
    launch = Launch(
        home=home,
        command=command,
        recipe=recipe,
        overrides=overrides,
        profile=profile,
        wait=profile.executor == "local" or options.wait or wait,
        report=options.report,
        dry_run=options.dry_run,
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # handle SIGTERM like SIGINT: cancel the jobs
    try:
        yield launch
    except NothingSubmitted as plan:
        print(plan)
    except BaseException:
        remove_unsubmitted(launch)
        raise
    finally:
        if launch.folders and not launch.wait:
            sync_in_background(launch.home, launch.folders)
        if launch.mlflow_stale:
            print(f"MLflow at {launch.tracker.uri} did not answer", file=sys.stderr)
            print(f"next: {next_command(options, 'sync')}", file=sys.stderr)


def remove_unsubmitted(launch: Launch) -> None:
    """Remove the folders that a refused command has created: of its submission, and of runs without jobs.

    Folders of an earlier command, such as that of a resumed run, have jobs or are not in the submission, and stay.
    """
    if launch.submission is None:
        return
    empty = [folder for folder in launch.folders if not has_jobs(folder)]
    for folder in empty:
        shutil.rmtree(folder, ignore_errors=True)
    launch.folders = [folder for folder in launch.folders if folder not in empty]
    if not launch.folders:
        shutil.rmtree(launch.submission, ignore_errors=True)


def has_jobs(folder: Path) -> bool:
    """Return whether jobs of a run were submitted."""
    return (folder / runs.RECORD).exists() and bool(runs.load(folder).jobs)


def load_profile(options: SubmissionOptions) -> Profile:
    """Return the cluster profile, with the number of GPUs per node from the options if it is given there."""
    profile = profiles.load(options.cluster or profiles.default_name())
    return replace(profile, gpus_per_node=options.gpus_per_node) if options.gpus_per_node else profile


def read_recipe(home: Path, options: RecipeOptions) -> Recipe:
    """Return the recipe that the options name, with their overrides. Raises ValueError for an unknown recipe or key."""
    name = options.recipe or DEFAULT_RECIPE
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}; it must be one of {', '.join(RECIPES)}")
    return override_recipe(RECIPES[name](str(home)), options)


def override_recipe(recipe: Recipe, options: RecipeOptions) -> Recipe:
    """Return the recipe with the overrides and the dataset of the options, and with absolute paths."""
    recipe = resolve_paths(apply(recipe, options.overrides))
    if options.dataset:
        path = options.dataset if is_url(options.dataset) else Path(options.dataset).absolute()
        recipe = apply(recipe, [f"{DATASET_KEY}{path}"])
    if not recipe.data.path.strip():
        raise ValueError("data.path: is empty; give the folder or URL of a dataset")
    return recipe


def resolve_paths(recipe: Recipe) -> Recipe:
    """Make the paths of local files absolute: jobs run in another directory."""
    values = {name: getattr(recipe.data, name) for name in ("source", "vae", "text_encoder", "caption_model")}
    local = {name: value for name, value in values.items() if value not in BUILT_IN and not is_url(value)}
    paths = {name: Path(value).absolute() for name, value in local.items() if "*" in value or Path(value).exists()}
    assignments = [f"data.{name}={path}" for name, path in paths.items()]
    assignments += [f"sample.prompts={Path(recipe.sample.prompts).absolute()}"] if recipe.sample.prompts else []
    if Path(recipe.evaluation.features).exists():
        assignments.append(f"evaluation.features={Path(recipe.evaluation.features).absolute()}")
    return apply(recipe, assignments)


def read_run_recipe(folder: Path) -> Recipe:
    """Return the recipe of a run. Raises ValueError if the folder is not a run folder."""
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder}: no run folder; config.json is missing")
    content = records.read(folder / "config.json", dict[str, Any])
    return from_json(json.dumps(present(content, home_of(folder))), str(folder / "config.json"))
