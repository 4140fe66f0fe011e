"""Create a dataset: fix its source, shards, image size and models.

`caption` does the same for a dataset that does not exist yet. The settings (data.*) cannot change afterwards.
"""

from jobs.commands.data.dataset import DatasetOptions, open_writable_dataset
from jobs.commands.hints import next_command
from jobs.commands.launching import launching, read_recipe
from jobs.commands.options import Command
from jobs.state import ledger
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
    manifest = open_writable_dataset(launch, create=True)
    data = manifest["data"]
    return (
        f"dataset {launch.dataset}: {manifest['images']} images of {data['source']} in {data['num_shards']} shards of "
        f"{manifest['rows_per_shard']}, {data['image_size']} px, hash {manifest['hash']}\n"
        f"{describe_contents(launch.dataset, len(manifest['class_names']), data['captioner'])}"
        f"next: {next_command(options, 'caption')}"
    )


def describe_contents(dataset: str, classes: int, captioner: str) -> str:
    """Describe what was taken from the source and left out, one line each; "" for a dataset without that record."""
    contents = ledger.contents(dataset)
    if contents is None:
        return ""
    labelled, largest = contents["labelled"], contents["largest_label"]
    labels = f"{labelled} labels up to {largest}" if labelled else "no labels"
    taken = f"source: {contents['items']} items, {labels}, {classes} named classes"
    lines = [f"{taken}, {'with' if contents['has_words'] else 'no'} words"]
    if columns := [f"{role} from {', '.join(names)}" for role, names in contents["columns"].items() if names]:
        lines.append(f"columns: {'; '.join(columns)}")
    if left_out := [f"{count} {reason}" for reason, count in contents["left_out"].items()]:
        lines.append(f"left out: {', '.join(left_out)}")
    if captioner == "labels" and not contents["has_words"]:
        lines.append(
            "warning: no item has words; set data.captioner=vllm, or name the captions by data.columns.caption"
        )
    return "".join(f"{line}\n" for line in lines)


COMMAND = Command(DatasetOptions, run)
