"""Create a dataset: fix its source, shards, image size and models.

`caption` does the same for a dataset that does not exist yet. The settings (data.*) cannot change afterwards.
"""

from jobs.commands.data.dataset import DatasetOptions, describe_contents, open_writable_dataset
from jobs.commands.hints import next_command
from jobs.commands.launching import launching, read_recipe
from jobs.commands.options import Command
from jobs.state import run as runs
from jobs.submission.launch import Launch, NothingSubmitted
from pixart.config.recipe import to_json


def run(options: DatasetOptions) -> int:
    home = runs.home(options.home)
    with launching("init", options, home, read_recipe(home, options), overrides=options.overrides) as launch:
        print(init(launch, options))
    return 0


def init(launch: Launch, options: DatasetOptions) -> str:
    """Create the dataset if it does not exist, and describe it."""
    if launch.dry_run:
        raise NothingSubmitted(to_json(launch.recipe))
    manifest = open_writable_dataset(launch, create=True, describe=False)
    data = manifest["data"]
    return (
        f"dataset {launch.dataset}: {manifest['images']} images of {data['source']} in {data['num_shards']} shards of "
        f"{manifest['rows_per_shard']}, {data['image_size']} px, hash {manifest['hash']}\n"
        f"{describe_contents(launch.dataset, manifest)}"
        f"next: {next_command(options, 'caption')}"
    )


COMMAND = Command(DatasetOptions, run)
