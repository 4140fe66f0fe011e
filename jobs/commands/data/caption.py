"""Caption and screen the images of a dataset, one shard per array element.

Creates the dataset if it does not exist. Shards that are done are not captioned again.
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
from jobs.state import run as runs
from jobs.submission.launch import Launch
from jobs.submission.submit import run_array


def run(options: ArrayOptions) -> int:
    home = runs.home(options.home)
    with launching("caption", options, home, read_recipe(home, options), overrides=options.overrides) as launch:
        launch.per_task = options.per_task
        print(caption(launch, options))
    return 0


def caption(launch: Launch, options: ArrayOptions) -> str:
    """Submit the array of caption tasks."""
    selected, limit = parse_array(options.array)
    manifest = open_writable_dataset(launch, create=True, shards=selected)
    refuse_adopted(launch, manifest)
    shards = select_shards(launch, manifest["data"]["num_shards"], selected)
    submitted = run_array(launch, "caption", shards, limit)
    if not launch.wait:
        return describe_submission(options, submitted)
    return describe_shards(launch, options, "caption", shards, folder="captions", following="latents")


COMMAND = Command(ArrayOptions, run)
