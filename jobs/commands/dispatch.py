"""What each command of the launcher does. Imports no torch: the jobs themselves do, where they run."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from jobs.commands.convert import convert_command
from jobs.commands.dataset import array_command, audit_command, init_command, verify_command
from jobs.commands.pipeline import pipeline_command
from jobs.commands.recaption import recaption_command
from jobs.commands.sample import sample_command
from jobs.commands.train import train_command
from jobs.state import run as runs
from jobs.submission.launch import Launch, NothingSubmitted
from jobs.submission.submit import resubmit
from jobs.tracking.sync import publish_in_background
from pixart.config import overrides
from pixart.config.dataset import is_url
from pixart.config.recipe import Recipe, from_json
from pixart.recipes import DEFAULT_RECIPE, RECIPES
from slurm import profile as profiles
from slurm.profile import Profile

Rebuilt = TypeVar("Rebuilt")


def run(options: argparse.Namespace) -> int:
    """Runs the command that `options` names. Raises ValueError for what the user can mend, else JobFailedError."""
    launch = prepare(options)
    try:
        print(COMMANDS[options.job](launch, options))
    except NothingSubmitted as plan:
        print(plan)
    finally:
        if launch.folders and not launch.wait:
            publish_in_background(launch.home, launch.folders)
        if launch.untold:
            print(f"MLflow at {launch.tracker.uri} did not answer\nnext: python -m jobs.launch sync", file=sys.stderr)
    return 0


def prepare(options: argparse.Namespace) -> Launch:
    home = runs.home(options.home)
    profile = profiles.load(options.cluster or profiles.default_name())
    if options.gpus_per_node:
        profile = replace(profile, gpus_per_node=options.gpus_per_node)
    wait = profile.executor == "local" or options.wait or options.job in ("demo", "recaption")
    recipe = read_recipe(home, options)
    return Launch(home=home, job=options.job, recipe=recipe, profile=profile, wait=wait, dry_run=options.dry_run)


def read_recipe(home: Path, options: argparse.Namespace) -> Recipe:
    """The recipe that is named; of a run that goes on, that of the run, to which `--set` may add."""
    if options.job == "retry":
        return recipe_of(runs.find(home, options.run).folder)
    if options.settings not in RECIPES:
        raise ValueError(f"unknown recipe {options.settings!r}: it must be one of {', '.join(RECIPES)}")
    recipe = RECIPES[options.settings](str(home))
    if options.job == "train" and options.resume:
        recipe = recipe_of(Path(options.resume))
        if options.settings not in (DEFAULT_RECIPE, recipe.name):
            raise ValueError(f"--recipe {options.settings}: {options.resume} is a run of the recipe {recipe.name}")
    recipe = absolute(overrides.apply(recipe, options.overrides))
    if options.dataset:
        path = options.dataset if is_url(options.dataset) else Path(options.dataset).absolute()
        recipe = overrides.apply(recipe, [f"data.path={path}"])
    if not recipe.data.path.strip():
        raise ValueError("data.path: is empty")
    return recipe


def recipe_of(folder: Path) -> Recipe:
    """What a run was asked for."""
    if not (folder / "config.json").exists():
        raise ValueError(f"{folder}: no run folder")
    return rebuilt(folder / "config.json", from_json)


def profile_of(folder: Path) -> Profile:
    """The cluster that a run was submitted to."""
    return rebuilt(folder / "profile.json", lambda text: Profile(**json.loads(text)))


def rebuilt(path: Path, rebuild: Callable[[str], Rebuilt]) -> Rebuilt:
    try:
        return rebuild(path.read_text())
    except (TypeError, LookupError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged, or of another version: {error}") from None


def absolute(recipe: Recipe) -> Recipe:
    """With the names of files as they are from anywhere: jobs run in another directory."""
    named = {name: getattr(recipe.data, name) for name in ("source", "vae", "text_encoder", "caption_model")}
    local = {name: value for name, value in named.items() if value not in BUILT_IN and not is_url(value)}
    there = {name: Path(value).absolute() for name, value in local.items() if "*" in value or Path(value).exists()}
    return overrides.apply(recipe, [f"data.{name}={path}" for name, path in there.items()])


def retry_command(launch: Launch, options: argparse.Namespace) -> str:
    run = runs.find(launch.home, options.run)
    if not options.cluster:
        launch.profile = profile_of(run.folder)
        launch.wait = launch.profile.executor == "local" or options.wait
    run, missing = resubmit(launch, run)
    if not missing:
        return f"nothing to do: all of {run.folder.name} is done or under way"
    what = f"{len(missing)} of {run.total} shards" if run.elements else run.kind
    return f"submitted {what} again as {run.jobs[-1][0].partition('_')[0]}" if not launch.wait else f"{what} done"


BUILT_IN = ("", "demo", "minilm")
COMMANDS = {
    "init": init_command,
    "caption": array_command,
    "latents": array_command,
    "audit": audit_command,
    "verify": verify_command,
    "train": train_command,
    "convert": convert_command,
    "sample": sample_command,
    "recaption": recaption_command,
    "demo": pipeline_command,
    "pipeline": pipeline_command,
    "retry": retry_command,
}
