"""The recipe of a training run that starts from a checkpoint, where the command names none."""

from pathlib import Path
from typing import Any

from jobs.commands.launching import read_run_recipe
from jobs.state import ledger
from jobs.state.checkpoint_names import checkpoint_record, find_checkpoint
from pixart.config.dataset import data_from_dict
from pixart.config.latent_space import recorded_pixel_range
from pixart.config.recipe import Recipe
from pixart.recipes import RECIPES

DEMO = "demo"  # the source of rendered scenes, which only the recipe of the same name is made for


def recipe_of_checkpoint(home: Path, start: str, dataset: str | None) -> Recipe:
    """Return the recipe of a checkpoint; `dataset` is the dataset to train on, if the command names one.

    This is the recipe, with its overrides, of the run that wrote the checkpoint, or that wrote the one it was converted
    from; else the recipe that the checkpoint names; else the only recipe whose model is the checkpoint's, and whose
    dataset is of the same kind as the one to train on. Raises ValueError if there is no such recipe.
    """
    checkpoint = find_checkpoint(start)
    record = checkpoint_record(checkpoint)
    origin = record["provenance"].get("converted_from")
    for path in (checkpoint, *([Path(origin)] if origin else [])):
        folder = path.parent.parent  # of RUN/checkpoints/step-00000100, and of what was converted beside it
        if path.parent.name == "checkpoints" and (folder / "config.json").exists():
            return read_run_recipe(folder)
    name = record["provenance"].get("recipe")
    if name in RECIPES:
        return RECIPES[name](str(home))
    manifest = ledger.manifest(dataset or record["dataset"]) if dataset or record["dataset"] else None
    made = [recipe for recipe in (make(str(home)) for make in RECIPES.values()) if fits(recipe, record, manifest)]
    if len(made) != 1:
        of = f" and the dataset {manifest['data']['path']}" if manifest else ""
        matches = f"the recipes {' and '.join(recipe.name for recipe in made)} fit" if made else "no recipe fits"
        raise ValueError(
            f"--from {start}: {matches} its model{of}; give --recipe NAME, one of {', '.join(RECIPES)}, "
            "or --config FILE"
        )
    return made[0]


def fits(recipe: Recipe, record: dict[str, Any], manifest: dict[str, Any] | None) -> bool:
    """Return whether a recipe has the model of a checkpoint, and makes datasets like the one with `manifest`."""
    sizes = recipe.model.dit_arguments()
    if any(record["config"].get(key) not in (None, size) for key, size in sizes.items()):
        return False
    if manifest is None:
        return recipe.data.pixel_range == recorded_pixel_range(record)
    data = data_from_dict(manifest["data"])
    is_demo = (recipe.name == DEMO, data.source == DEMO)
    return is_demo[0] == is_demo[1] and recipe.data.pixel_range == data.pixel_range
