"""A finished dataset of scenes of six shapes in aspect buckets, and the recipe of a very small model."""

import dataclasses
import io
from pathlib import Path

import pytest
from PIL import Image

from pixart.config.recipe import Recipe, to_json
from pixart.data.sources.open import open_source

SIZES = ((128, 128), (256, 64), (64, 256), (192, 96), (96, 192), (160, 96))  # widths and heights of the images
BUCKETS = "64x64,128x32,32x128,96x48,48x96,80x48"
IMAGES, SHARDS = 72, 4


def write_images(folder: Path, images: int = IMAGES) -> None:
    """Write demo scenes that are stretched to SIZES, with their captions."""
    folder.mkdir(parents=True)
    for index, item in enumerate(open_source("demo", max_images=images, image_size=64).read(0, images)):
        scene = Image.open(io.BytesIO(item.data)).resize(SIZES[index % len(SIZES)], Image.Resampling.BICUBIC)
        scene.save(folder / f"{index:03}.png")
        (folder / f"{index:03}.txt").write_text(item.text)


@pytest.fixture(scope="session")
def bucketed_recipe(small_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Recipe of a dataset of 72 images, 12 in each of 6 aspect buckets, with captions and latents."""
    from jobs.tasks import caption, init_dataset, latents

    home = tmp_path_factory.mktemp("bucketed")
    write_images(home / "images")
    data = dataclasses.replace(
        small_recipe.data,
        path=str(home / "dataset"),
        source=str(home / "images"),
        max_images=None,
        num_shards=SHARDS,
        aspect_buckets=BUCKETS,
    )
    recipe = dataclasses.replace(small_recipe, data=data)
    init_dataset.run(to_json(recipe))
    caption.run(data.path, list(range(SHARDS)))
    latents.run(data.path, list(range(SHARDS)))
    return recipe
