"""Images and features for the tests of evaluations: crops of pictures that the tests render, mutated with a seed."""

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageFilter

from pixart.demo.scenes import make_scene, render

SIZE = 64  # pixels per side


def scenes(count: int, seed: int) -> list[Image.Image]:
    """Return demo scenes of a seed."""
    return [Image.fromarray(render(make_scene(seed, index), SIZE)) for index in range(count)]


def mutated(
    images: Sequence[Image.Image], count: int, seed: int, share: tuple[float, float] = (0.6, 1)
) -> list[Image.Image]:
    """Return crops of images, flipped at random and with changed brightness, of SIZE pixels per side.

    `share` is the range of their sides relative to the shorter side of the image.
    """
    random = np.random.default_rng(seed)
    copies = []
    for index in range(count):
        image = images[index % len(images)]
        side = int(min(image.size) * random.uniform(*share))
        left, top = (int(random.integers(0, extent - side + 1)) for extent in image.size)
        crop = image.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        levels = np.asarray(crop, float)[:, :: random.choice([-1, 1])] * random.uniform(0.8, 1.2, 3)
        copies.append(Image.fromarray(np.clip(levels, 0, 255).astype(np.uint8)))
    return copies


def blurred(image: Image.Image) -> Image.Image:
    """Return an image after a Gaussian blur of 1 pixel."""
    return image.filter(ImageFilter.GaussianBlur(1))


def noisy(seed: int) -> Callable[[Image.Image], Image.Image]:
    """Return a function that adds Gaussian noise of 12 levels to an image."""
    random = np.random.default_rng(seed)

    def add(image: Image.Image) -> Image.Image:
        levels = np.asarray(image, float) + random.normal(0, 12, (*image.size[::-1], 3))
        return Image.fromarray(np.clip(np.rint(levels), 0, 255).astype(np.uint8))

    return add
