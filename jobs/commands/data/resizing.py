"""A dataset that takes over the captions of another one, and has its images at other sizes."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

from jobs.commands.data.dataset import ArrayOptions
from jobs.commands.launching import override_recipe, read_recipe
from jobs.state import ledger
from pixart.config.dataset import check_shared_captions, data_from_dict, is_url
from pixart.config.recipe import Recipe

OptionsT = TypeVar("OptionsT", bound=ArrayOptions)


@dataclass(frozen=True, kw_only=True)
class Resizing(Generic[OptionsT]):
    """The dataset whose captions are taken over, with the options and the recipe of the new one."""

    origin: str
    origin_hash: str
    options: OptionsT  # that name the new dataset
    recipe: Recipe


def resizing(home: Path, name: str, options: OptionsT) -> Resizing[OptionsT]:
    """Return what `latents --from NAME` creates: its data is that of the other dataset, with the overrides of options.

    Without a name for the new dataset, it is that of the other one with its image size. Raises ValueError for a dataset
    whose captions cannot be taken over, for keys that captions depend on, and for a new dataset that exists otherwise.
    """
    origin = Path(name).absolute()
    manifest = None if is_url(name) else ledger.manifest(origin)
    if manifest is None:
        raise ValueError(f"--from {name}: is not a dataset on a file system; run 'caption' to create one")
    if ledger.is_adopted(manifest):
        raise ValueError(f"--from {name}: was adopted with its captions and latents, and has no images to encode")
    data = replace(data_from_dict(manifest["data"]), path=str(origin))
    defaults = read_recipe(home, replace(options, overrides=(), dataset=None))
    recipe = override_recipe(replace(defaults, data=data), options)
    if not options.names_dataset:
        if recipe.data.image_size == data.image_size:
            raise ValueError(f"--from {name}: the new dataset has the same data.image_size; name it by --dataset")
        folder = f"{origin}-{recipe.data.image_size}"
        options = replace(options, dataset=folder, typed=options.typed and replace(options.typed, dataset=folder))
        recipe = override_recipe(recipe, options)
    check_shared_captions(data, recipe.data)
    if Path(recipe.data.path).resolve() == origin.resolve():
        raise ValueError(f"--from {name}: is the dataset of --dataset; name a new one")
    existing = ledger.manifest(recipe.data.path)
    if existing and existing.get("captions_from", {}).get("hash") != manifest["hash"]:
        raise ValueError(
            f"dataset {recipe.data.path} exists, and did not take over the captions of {origin}; name another by "
            "--dataset"
        )
    return Resizing(origin=str(origin), origin_hash=manifest["hash"], options=options, recipe=recipe)
