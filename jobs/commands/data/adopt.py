"""Make a dataset of latents and captions that are already computed.

One array element makes one shard of one file. SOURCE holds `.pt` files with latents and labels, token ids or both
captions' token ids, or `.array_record` files with latents and labels or texts. Nothing is computed again: token ids are
stored as they are, and texts are tokenized. Shards that are done are not adopted again.
"""

from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from jobs.commands.data.dataset import ArrayOptions, select_shards
from jobs.commands.data.shard_ranges import parse_array
from jobs.commands.hints import describe_submission, next_command
from jobs.commands.launching import launching, read_recipe
from jobs.commands.options import Command, argument, option
from jobs.state import ledger
from jobs.state import run as runs
from jobs.submission.datasets import open_dataset
from jobs.submission.launch import Launch
from jobs.submission.submit import run_array
from jobs.tasks import adopt as task
from pixart.config.dataset import is_url
from pixart.config.recipe import Recipe, to_json
from pixart.recipes import DEFAULT_RECIPE

DEFAULT_PIXEL_RANGE = (0, 1)  # of latents that were computed by the training code which the suite continues


@dataclass(frozen=True, kw_only=True)
class Options(ArrayOptions):
    """The options of `adopt`."""

    source: str = argument("SOURCE", help="Folder of shards, pattern of their names in quotes, or one shard.")
    class_names: str | None = option(
        "--class-names",
        metavar="FILE",
        help="Names of the classes, one per line in the order of the labels (default: the indices as names).",
    )

    @property
    def chosen(self) -> set[str]:
        """The keys of `data` that the user has set."""
        return {item.split("=")[0].removeprefix("data.") for item in self.overrides if item.startswith("data.")}


def run(options: Options) -> int:
    home = runs.home(options.home)
    recipe = make_recipe(read_recipe(home, options), options)
    with launching("adopt", options, home, recipe, overrides=options.overrides) as launch:
        launch.per_task = options.per_task
        print(adopt(launch, options))
    return 0


def make_recipe(recipe: Recipe, options: Options) -> Recipe:
    """Return the recipe with the source of the options, and with the settings of adopted datasets.

    Raises ValueError for a source without shards, and for a VAE that is not named: nothing in the shards says it.
    """
    from pixart.data.adoption.shards import find_shards

    if "source" in options.chosen:
        raise ValueError("data.source: the argument SOURCE names the shards; leave the key out")
    if is_url(recipe.data.path):
        raise ValueError(
            f"adopt: the dataset {recipe.data.path} is a URL; create it on a file system, and copy it there"
        )
    if recipe.name == DEFAULT_RECIPE and "vae" not in options.chosen:
        raise ValueError(
            "data.vae: name the VAE that encoded the latents, by --set data.vae=FOLDER or by --recipe xl for that of "
            "Stable Diffusion 3"
        )
    source = options.source if is_url(options.source) else str(Path(options.source).absolute())
    values: dict[str, Any] = {"source": source, "captioner": "adopted", "max_images": None}
    values |= {"pixel_range": DEFAULT_PIXEL_RANGE, "num_shards": len(find_shards(source))}
    values |= {"store_text_embeddings": False}
    return replace(
        recipe, data=replace(recipe.data, **{key: values[key] for key in values if key not in options.chosen})
    )


def adopt(launch: Launch, options: Options) -> str:
    """Create the dataset if it does not exist, and submit the array of adopt tasks."""
    selected, limit = parse_array(options.array)
    class_names = read_class_names(options.class_names) if options.class_names else []
    if not launch.dry_run and ledger.manifest(launch.dataset) is None:
        select_shards(launch, launch.recipe.data.num_shards, selected)
    source, chosen = launch.recipe.data.source, options.chosen
    if launch.recipe.name != DEFAULT_RECIPE:
        chosen |= {"vae", "text_encoder"}
    create = partial(task.init, to_json(launch.recipe), class_names, sorted(chosen))
    manifest = open_dataset(launch, create)
    check_same(launch, manifest, source, class_names)
    shards = select_shards(launch, manifest["data"]["num_shards"], selected)
    submitted = run_array(launch, "adopt", shards, limit)
    if not launch.wait:
        return describe_submission(options, submitted)
    return describe(launch, options, manifest, shards)


def check_same(launch: Launch, manifest: dict[str, Any], source: str, class_names: list[str]) -> None:
    """Check that an existing dataset was adopted from the same shards with the same classes.

    Raises ValueError otherwise.
    """
    data = manifest["data"]
    if (data["captioner"], data["source"]) != ("adopted", source):
        raise ValueError(
            f"dataset {launch.dataset}: was created from {data['source']} with the captioner {data['captioner']}; name "
            f"another dataset for {source} by --dataset"
        )
    if class_names and class_names != manifest["class_names"]:
        raise ValueError(
            f"--class-names: the dataset {launch.dataset} was created with other names; leave the option out, or name "
            "another dataset by --dataset"
        )


def read_class_names(file: str) -> list[str]:
    """Return the names in a file, one per line.

    Raises ValueError for a file that cannot be read or is empty, and for a repeated name.
    """
    try:
        names = [line.strip() for line in Path(file).read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--class-names {file}: {getattr(error, 'strerror', None) or error}") from None
    while names and not names[-1]:
        names.pop()
    if not names or "" in names:
        line = names.index("") + 1 if names else 1
        raise ValueError(f"--class-names {file}: line {line} has no name; give one name per line")
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"--class-names {file}: {name!r} is there {count} times; give every class its own name")
    return names


def describe(launch: Launch, options: Options, manifest: dict[str, Any], shards: list[int]) -> str:
    """Return the numbers of valid rows and of those with each problem, and the command that follows."""
    entries = ledger.entries(launch.dataset, "latents", shards).values()
    rows, valid = sum(entry.rows for entry in entries), sum(entry.valid for entry in entries)
    lines = [f"adopted: {len(shards)} shards, {valid} of {rows} rows valid, in {launch.dataset}"]
    if valid < rows:
        reasons = count_reasons(launch.dataset, shards)
        lines.append("invalid: " + "; ".join(f"{count} {reason}" for reason, count in reasons.most_common()))
    data = manifest["data"]
    low, high = data["pixel_range"]
    lines.append(f"the latents are those of {data['vae']} for pixels from {low} to {high}")
    return "\n".join([*lines, f"next: {next_command(options, 'audit')}"])


def count_reasons(dataset: str, shards: list[int]) -> Counter[str]:
    """Return how many rows of the caption parts are invalid for each reason."""
    import pyarrow.parquet as pq

    counts: Counter[str] = Counter()
    for shard in shards:
        reasons = pq.read_table(task.part_path(dataset, shard), columns=["reason"])["reason"]
        counts.update({item["values"]: item["counts"] for item in reasons.value_counts().to_pylist() if item["values"]})
    return counts


COMMAND = Command(Options, run)
