"""Encode the images and captions of a dataset, one shard per array element.

Needs the captions of the same shards. Shards that are done are not encoded again. With --from, creates a dataset of
another size that takes over the captions of an existing one.
"""

import functools
from dataclasses import dataclass
from typing import Any

from jobs.commands.data.dataset import (
    ArrayOptions,
    describe_shards,
    open_writable_dataset,
    refuse_adopted,
    select_shards,
)
from jobs.commands.data.resizing import Resizing, resizing
from jobs.commands.data.shard_ranges import parse_array
from jobs.commands.hints import describe_submission
from jobs.commands.launching import launching, read_recipe
from jobs.commands.options import Command, option
from jobs.state import ledger
from jobs.state import run as runs
from jobs.submission.launch import Launch
from jobs.submission.submit import run_array
from jobs.tasks import init_dataset
from pixart.config.recipe import to_json


@dataclass(frozen=True, kw_only=True)
class Options(ArrayOptions):
    """The options of `latents`."""

    origin: str | None = option(
        "--from",
        metavar="DATASET",
        help="Dataset whose captions --dataset takes over, with another data.image_size or other data.aspect_buckets "
        "(default: the captions of --dataset itself).",
    )


def run(options: Options) -> int:
    home = runs.home(options.home)
    resized = resizing(home, options.origin, options) if options.origin else None
    if resized:
        options, recipe = resized.options, resized.recipe
    else:
        recipe = read_recipe(home, options)
    with launching("latents", options, home, recipe, overrides=options.overrides) as launch:
        launch.per_task = options.per_task
        print(latents(launch, options, resized))
    return 0


def latents(launch: Launch, options: ArrayOptions, resized: Resizing | None = None) -> str:
    """Submit the array of latents tasks. Raises ValueError if captions are missing."""
    selected, limit = parse_array(options.array)
    if resized:
        shards = select_shards(launch, launch.recipe.data.num_shards, selected)
        ledger.captions_to_take_over(resized.origin, resized.origin_hash, shards)
        create_by = functools.partial(init_dataset.resize, to_json(launch.recipe), resized.origin)
        manifest = open_writable_dataset(launch, create=True, create_by=create_by, shards=selected, describe=False)
    else:
        manifest = open_writable_dataset(launch, shards=selected)
        refuse_adopted(launch, manifest)
        shards = select_shards(launch, manifest["data"]["num_shards"], selected)
        require_captions(launch, manifest, shards)
    submitted = run_array(launch, "latents", shards, limit)
    if not launch.wait:
        return describe_submission(options, submitted)
    return describe_shards(launch, options, "latents", shards, folder=ledger.ARRAYS, following="audit")


def require_captions(launch: Launch, manifest: dict[str, Any], shards: list[int]) -> None:
    """Raise ValueError for a shard that has no captions, and none that the dataset could take over."""
    if "captions_from" not in manifest:
        ledger.captions(launch.dataset, shards)
        return
    complete = ledger.current(launch.dataset, "caption", shards, manifest["hash"])
    if missing := [shard for shard in shards if shard not in complete]:
        origin = ledger.captions_origin(launch.dataset, manifest)
        ledger.captions_to_take_over(origin, manifest["captions_from"]["hash"], missing)


COMMAND = Command(Options, run)
