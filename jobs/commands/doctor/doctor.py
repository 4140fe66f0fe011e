"""Check what the jobs of a profile and recipe need, and report what is missing.

Checks the Python environments, CUDA, vLLM and TransformerEngine, the models on disk with their licences, space and
quota, and what Slurm says about the jobs. The exit code is 2 if something is missing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jobs.commands.doctor import models, scheduler, software, storage
from jobs.commands.doctor.finding import Finding
from jobs.commands.launching import read_recipe
from jobs.commands.options import Command, RecipeOptions, option
from jobs.state import run as runs
from pixart.config.recipe import Recipe
from pixart.terminal import printable
from slurm import profile as profiles
from slurm.profile import Profile


@dataclass(frozen=True, kw_only=True)
class Options(RecipeOptions):
    """The options of `doctor`."""

    cluster: str | None = option(
        "--cluster",
        metavar="PROFILE",
        help="Cluster profile by name or path (default: $PIXART_CLUSTER, else local where there is no Slurm).",
    )
    fetch: bool = option(
        "--fetch",
        default=False,
        help="Download the models that are not on disk, for nodes without network (default: report them).",
    )


def run(options: Options) -> int:
    home = runs.home(options.home)
    recipe = read_recipe(home, options)
    profile = profiles.load(options.cluster or profiles.default_name())
    states = []
    for finding in check(profile, recipe, home, fetch=options.fetch):
        print(printable(str(finding)), flush=True)
        states.append(finding.state)
    count = states.count("missing")
    print(f"{count} of {len(states)} checks found something missing" if count else "nothing is missing")
    return 2 if count else 0


def check(profile: Profile, recipe: Recipe, home: Path, *, fetch: bool) -> Iterator[Finding]:
    """Yield what is found, in the order in which jobs need it."""
    yield from scheduler.check(profile, home)
    yield from software.check(profile, recipe)
    yield from models.check(recipe, fetch=fetch)
    yield from storage.check(recipe, home)


COMMAND = Command(Options, run)
