"""Encode the images and captions of a dataset, one shard per array element.

Needs the captions of the same shards. Shards that are done are not encoded again.
"""

from jobs.commands.data.dataset import (
    ArrayOptions,
    describe_shards,
    open_writable_dataset,
    refuse_adopted,
    select_shards,
)
from jobs.commands.data.shard_ranges import parse_array
from jobs.commands.hints import describe_submission
from jobs.commands.launching import launching, read_recipe
from jobs.commands.options import Command
from jobs.state import ledger
from jobs.state import run as runs
from jobs.submission.launch import Launch
from jobs.submission.submit import run_array


def run(options: ArrayOptions) -> int:
    home = runs.home(options.home)
    with launching("latents", options, home, read_recipe(home, options), overrides=options.overrides) as launch:
        launch.per_task = options.per_task
        print(latents(launch, options))
    return 0


def latents(launch: Launch, options: ArrayOptions) -> str:
    """Submit the array of latents tasks. Raises ValueError if captions are missing."""
    selected, limit = parse_array(options.array)
    manifest = open_writable_dataset(launch, shards=selected)
    refuse_adopted(launch, manifest)
    shards = select_shards(launch, manifest["data"]["num_shards"], selected)
    ledger.captions(launch.dataset, shards)
    submitted = run_array(launch, "latents", shards, limit)
    if not launch.wait:
        return describe_submission(options, submitted)
    return describe_shards(launch, options, "latents", shards, folder=ledger.ARRAYS, following="audit")


COMMAND = Command(ArrayOptions, run)
