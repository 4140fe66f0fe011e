"""Aspect buckets: the shapes that images of a dataset are resized and cropped to, each image to the nearest one.

A shape is (height, width) in pixels. `data.aspect_buckets` names the shapes as one of

- `pixart`, the 40 shapes of PixArt-alpha, whose areas are those of a square of `data.image_size`,
- `STEP:RATIO`, shapes whose sides are multiples of STEP pixels, with at most the area of that square and a ratio of the
  longer to the shorter side of at most RATIO, and
- `WIDTHxHEIGHT,WIDTHxHEIGHT,...`, the shapes themselves.
"""

import math
import re
from collections.abc import Sequence

Shape = tuple[int, int]

PIXART = "pixart"
MAX_BUCKETS = 100  # each has an array in the store, and a batch has images of one
# PixArt-alpha's heights and widths in sixteenths of the square's side, of the ratios below 1. Those above 1 are their
# mirror images, of which one is missing (github.com/PixArt-alpha/PixArt-alpha, diffusion/data/datasets/utils.py).
PIXART_UNITS = 16
PIXART_SHAPES = (
    *((8, width) for width in (32, 31, 30, 29)),
    *((9, width) for width in (28, 27, 26)),
    *((10, width) for width in (25, 24)),
    *((11, width) for width in (23, 22, 21)),
    *((12, width) for width in (21, 20)),
    *((13, width) for width in (19, 18)),
    *((14, width) for width in (18, 17)),
    *((15, width) for width in (17, 16)),
)
MISSING_MIRROR_IMAGE = (21, 11)
STEP_AND_RATIO = re.compile(r"(\d+):(\d+(?:\.\d+)?)")
WIDTH_AND_HEIGHT = re.compile(r"(\d+)x(\d+)")
GRAMMAR = f"{PIXART}, STEP:RATIO (such as 32:2), WIDTHxHEIGHT,WIDTHxHEIGHT,... or none"


def bucket_shapes(buckets: str | None, image_size: int) -> tuple[Shape, ...]:
    """Return the shapes of `data.aspect_buckets` in pixels, by ascending ratio of height to width; () for None.

    Raises ValueError for a text of another form, for shapes that are equal, and for sizes that have no such shapes.
    """
    if buckets is None:
        return ()
    if buckets == PIXART:
        shapes = pixart_shapes(image_size)
    elif match := STEP_AND_RATIO.fullmatch(buckets):
        shapes = stepped_shapes(int(match[1]), float(match[2]), image_size)
    else:
        shapes = listed_shapes(buckets)
    if len(shapes) > MAX_BUCKETS:
        raise ValueError(f"aspect_buckets={buckets}: has {len(shapes)} shapes; it must have at most {MAX_BUCKETS}")
    return tuple(sorted(shapes, key=lambda shape: (shape[0] / shape[1], shape)))


def pixart_shapes(image_size: int) -> list[Shape]:
    """Return PixArt-alpha's 40 shapes. Raises ValueError for a size that is not a multiple of 16."""
    unit, rest = divmod(image_size, PIXART_UNITS)
    if rest:
        raise ValueError(
            f"aspect_buckets={PIXART}: image_size={image_size} must be a multiple of {PIXART_UNITS}, of which the "
            "sides of these shapes are multiples"
        )
    mirror_images = [(height, width) for width, height in PIXART_SHAPES if (height, width) != MISSING_MIRROR_IMAGE]
    units = [*PIXART_SHAPES, (PIXART_UNITS, PIXART_UNITS), *mirror_images]
    return [(height * unit, width * unit) for height, width in units]


def stepped_shapes(step: int, ratio: float, image_size: int) -> list[Shape]:
    """Return the largest shapes of at most the area of the square, with sides that are multiples of `step` pixels."""
    text = f"aspect_buckets={step}:{ratio:g}"
    if step < 1 or image_size % step:
        raise ValueError(f"{text}: the step must divide image_size={image_size}, so that the square is one of them")
    if ratio < 1:
        raise ValueError(f"{text}: the ratio of the longer to the shorter side must be at least 1")
    shapes = []
    for height in range(step, image_size + 1, step):
        width = image_size**2 // height // step * step
        if width <= ratio * height:
            shapes += [(height, width), (width, height)]
    return list(dict.fromkeys(shapes))


def listed_shapes(buckets: str) -> list[Shape]:
    """Return the shapes of a text `WIDTHxHEIGHT,...`. Raises ValueError for another text and for equal shapes."""
    matches = [WIDTH_AND_HEIGHT.fullmatch(part.strip()) for part in buckets.split(",")]
    shapes = [(int(match[2]), int(match[1])) for match in matches if match]
    if len(shapes) < len(matches) or not all(map(all, shapes)):
        raise ValueError(f"aspect_buckets={buckets}: must be {GRAMMAR}")
    for height, width in shapes:
        if shapes.count((height, width)) > 1:
            raise ValueError(f"aspect_buckets={buckets}: {width}x{height} is listed twice; remove one")
    return shapes


def nearest_bucket(width: int, height: int, shapes: Sequence[Shape]) -> int:
    """Return the index of the shape whose ratio of sides is nearest to that of an image, on a logarithmic scale.

    Of two that are equally near, it is the first, and of two of one ratio the larger one.
    """
    ratio = math.log(height / width)
    distances = [(abs(math.log(shape[0] / shape[1]) - ratio), -math.prod(shape)) for shape in shapes]
    return distances.index(min(distances))


def kept_fraction(width: int, height: int, shape: Shape) -> float:
    """Return the fraction of an image's area that is left after it was resized to cover a shape and cropped."""
    ratio = height * shape[1] / (width * shape[0])
    return min(ratio, 1 / ratio)
