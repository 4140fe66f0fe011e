"""Counts how many pictures show what their scene asks for, from pixels alone.

The background is what the picture's frame shows; the object is the largest connected region far from it;
its colour is the palette entry nearest to the median of its core; its shape is the template of the same centroid and
area that overlaps it best.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pixart.demo.scenes import BACKGROUNDS, COLORS, SHAPES, Scene, signed_distance, unit_area


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneReading:
    """What was read from a picture; shape and colour are None where nothing stands out from the background."""

    shape: str | None
    color: str | None
    background: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Shares, 0 to 1, of `total` pictures whose main colour and main shape are the scene's."""

    color: float
    shape: float
    total: int


def count(images: Sequence[np.ndarray] | np.ndarray, scenes: Sequence[Scene]) -> Counts:
    """Compares each image, uint8 of (height, width, 3), with the scene at the same place.

    Raises ValueError where there are no images, or not one for each scene.
    """
    if len(images) != len(scenes) or len(images) == 0:
        raise ValueError(f"{len(images)} images for {len(scenes)} scenes: must be one for each, and at least one")
    readings = [read_scene(image) for image in images]
    pairs = list(zip(readings, scenes, strict=True))
    return Counts(
        color=sum(reading.color == scene.color for reading, scene in pairs) / len(pairs),
        shape=sum(reading.shape == scene.shape for reading, scene in pairs) / len(pairs),
        total=len(pairs),
    )


def read_scene(image: np.ndarray) -> SceneReading:
    """Reads the main shape, its colour and the background from uint8 of (height, width, 3).

    Raises ValueError for another shape or type.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image of shape {image.shape} and type {image.dtype}: must be (height, width, 3) of uint8")
    pixels = image.astype(np.float64)
    strip = max(1, min(image.shape[:2]) // 32)  # 2 pixels of 64
    frame = np.ones(image.shape[:2], dtype=bool)
    frame[strip:-strip, strip:-strip] = False
    background_color = np.median(pixels[frame], axis=0)
    background = _nearest(background_color, BACKGROUNDS)

    # Far is more than half the way to the palette's colour that is most like this background.
    palette_distances = np.linalg.norm(np.subtract(list(COLORS.values()), BACKGROUNDS[background]), axis=1)
    distances = np.linalg.norm(pixels - background_color, axis=2)
    region = largest_region(distances > palette_distances.min() / 2)
    if not region.any():
        return SceneReading(shape=None, color=None, background=background)
    core = np.logical_and.reduce((region, *_neighbours(region)))  # the edge's pixels are half background
    color = _nearest(np.median(pixels[core if core.any() else region], axis=0), COLORS)
    return SceneReading(shape=_best_shape(region), color=color, background=background)


def largest_region(mask: np.ndarray) -> np.ndarray:
    """Returns, of a (height, width) mask, the largest part that is connected by pixel sides."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # every pixel takes the largest label among its neighbours', then its label's label, until none changes
        spread = np.where(mask, np.maximum.reduce((labels, *_neighbours(labels))), 0)
        spread = np.append(0, spread)[spread]  # a label names a pixel, whose own label may be larger: a leap
        if np.array_equal(spread, labels):
            break
        labels = spread
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return mask & (labels == sizes.argmax())


def _neighbours(values: np.ndarray) -> list[np.ndarray]:
    """What stands above, below, left and right of each place; zero beyond the edges."""
    padded = np.pad(values, 1)
    return [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]


def _best_shape(region: np.ndarray) -> str:
    rows, columns = np.nonzero(region)
    y = np.arange(region.shape[0])[:, None] - rows.mean()
    x = np.arange(region.shape[1]) - columns.mean()

    def overlap(shape: str) -> float:  # intersection over union
        template = signed_distance(shape, x, y, float(np.sqrt(region.sum() / unit_area(shape)))) < 0
        return (region & template).sum() / (region | template).sum()

    return max(SHAPES, key=overlap)


def _nearest(color: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    return min(palette, key=lambda name: float(np.linalg.norm(color - palette[name])))
