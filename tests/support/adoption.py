"""Adoption of precomputed shards into a dataset of the demo's recipe, in this process."""

import dataclasses
from pathlib import Path

from jobs.tasks import adopt
from pixart.config.recipe import Recipe, to_json
from pixart.data import manifest as manifests
from pixart.recipes import demo


def make_recipe(home: Path, source: Path, **changes) -> Recipe:
    recipe = demo(str(home))
    changes = {
        "pixel_range": (0, 1),
        "store_text_embeddings": False,
        "max_images": None,
        "max_text_tokens": 9,
    } | changes
    return dataclasses.replace(
        recipe, data=dataclasses.replace(recipe.data, source=str(source), captioner="adopted", **changes)
    )


def init(home: Path, source: Path, *, names: tuple[str, ...] = (), chosen: tuple[str, ...] = (), **changes) -> Recipe:
    recipe = make_recipe(home, source, **changes)
    adopt.init(to_json(recipe), list(names), ["vae", "text_encoder", *chosen])
    return recipe


def adopted(home: Path, source: Path, **options) -> manifests.Manifest:
    """Adopt all shards, and return the manifest."""
    recipe = init(home, source, **options)
    manifest = manifests.read(recipe.data.path)
    adopt.run(recipe.data.path, list(range(manifest.data.num_shards)))
    return manifest
