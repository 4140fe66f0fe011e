"""A classifier that scores whether generated images show the requested scenes.

The background is the median color of the image's frame. The object is the largest connected region whose color differs
from it. The object's color is the palette entry nearest to the median of its interior, and its shape is the template
of the same centroid and area with the highest intersection over union.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pixart.demo.scenes import BACKGROUNDS, COLORS, SHAPES, Scene, signed_distance, unit_area


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneReading:
    """The classification of an image. `shape` and `color` are None if no object differs from the background."""

    shape: str | None
    color: str | None
    background: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneAccuracy:
    """Shares, 0 to 1, of `total` images whose main color and main shape match their scene."""

    color: float
    shape: float
    total: int


def score(images: Sequence[np.ndarray] | np.ndarray, scenes: Sequence[Scene]) -> SceneAccuracy:
    """Compare images, uint8 (height, width, 3), with the scenes at the same positions.

    Raises ValueError if there are no images or their number differs from that of the scenes.
    """
    if len(images) != len(scenes) or len(images) == 0:
        raise ValueError(
            f"{len(images)} images for {len(scenes)} scenes: there must be one for each scene, and at least one"
        )
    readings = [read_scene(image) for image in images]
    pairs = list(zip(readings, scenes, strict=True))
    return SceneAccuracy(
        color=sum(reading.color == scene.color for reading, scene in pairs) / len(pairs),
        shape=sum(reading.shape == scene.shape for reading, scene in pairs) / len(pairs),
        total=len(pairs),
    )


def read_scene(image: np.ndarray) -> SceneReading:
    """Classify the main shape, its color and the background of an image, uint8 (height, width, 3).

    Raises ValueError for another shape or dtype.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image of shape {image.shape} and dtype {image.dtype}: must be (height, width, 3) and uint8")
    pixels = image.astype(np.float64)
    strip = max(1, min(image.shape[:2]) // 32)  # 2 pixels at 64 px
    frame = np.ones(image.shape[:2], dtype=bool)
    frame[strip:-strip, strip:-strip] = False
    background_color = np.median(pixels[frame], axis=0)
    background = _nearest(background_color, BACKGROUNDS)

    # Threshold: half the distance from the background to the nearest palette color.
    palette_distances = np.linalg.norm(np.subtract(list(COLORS.values()), BACKGROUNDS[background]), axis=1)
    distances = np.linalg.norm(pixels - background_color, axis=2)
    region = largest_region(distances > palette_distances.min() / 2)
    if not region.any():
        return SceneReading(shape=None, color=None, background=background)
    core = np.logical_and.reduce((region, *_neighbors(region)))  # pixels at the edge are blended with the background
    color = _nearest(np.median(pixels[core if core.any() else region], axis=0), COLORS)
    return SceneReading(shape=_best_shape(region), color=color, background=background)


def largest_region(mask: np.ndarray) -> np.ndarray:
    """Return the largest 4-connected component of a mask (height, width)."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:  # propagate the largest label of each neighborhood until nothing changes
        spread = np.where(mask, np.maximum.reduce((labels, *_neighbors(labels))), 0)
        spread = np.append(0, spread)[spread]  # pointer jumping: a label is the index of a pixel
        if np.array_equal(spread, labels):
            break
        labels = spread
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return mask & (labels == sizes.argmax())


def _neighbors(values: np.ndarray) -> list[np.ndarray]:
    """Return the values above, below, left and right of each position, zero outside the array."""
    padded = np.pad(values, 1)
    return [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]


def _best_shape(region: np.ndarray) -> str:
    """Return the shape whose template overlaps a region best."""
    rows, columns = np.nonzero(region)
    y = np.arange(region.shape[0])[:, None] - rows.mean()
    x = np.arange(region.shape[1]) - columns.mean()

    def overlap(shape: str) -> float:  # intersection over union
        template = signed_distance(shape, x, y, float(np.sqrt(region.sum() / unit_area(shape)))) < 0
        return (region & template).sum() / (region | template).sum()

    return max(SHAPES, key=overlap)


def _nearest(color: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> str:
    """Return the name of the palette color nearest to a color in RGB."""
    return min(palette, key=lambda name: float(np.linalg.norm(color - palette[name])))
