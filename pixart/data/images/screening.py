"""Bytes of a source item to an image, or a reason why not.

An image passes three gates: `decode` reads it, `measure` says in numbers what it looks like, and `check` holds the
numbers against the limits. All three are pure, and fast beside any model that sees the image later.
"""

import hashlib
import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from pixart.config.dataset import ScreeningConfig
from pixart.data.images.decoding import Reason, Rejected, decode, decode_shrunk

__all__ = [
    "Reason",
    "Rejected",
    "Statistics",
    "check",
    "decode",
    "decode_shrunk",
    "digest",
    "measure",
    "resize_and_crop",
    "thumbnail",
]

SIDE = 128  # pixels of the square copy that is measured
CELLS = 32  # cells a side, each of 4 x 4 of its pixels
MARGIN = 2  # cells at each edge, where a border is no content
CORNER = (3, 6)  # further cells (down, across) at each corner, where a logo is no content
TONE = 20  # levels of a channel: the width of one tone, as noise and vignetting spread it
TEXTURE = 8.0  # levels: a cell whose luma has less standard deviation is flat


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """What an image looks like, in numbers; all but width and height are of a copy of 128 x 128 pixels."""

    width: int
    height: int
    brightness: float  # mean luma, 0 to 1
    entropy: float  # bits of the luma histogram, 0 to 8
    dominant: float  # share of the pixels in the commonest colour, of 16 levels a channel
    flat: float  # share of the inner cells, without edges and corners, that are flat and of one tone
    gradient: float  # mean absolute difference of luma between neighbours, levels of 255 a pixel
    phash: int  # 64 bits, see `perceptual_hash`


def measure(image: Image.Image, size: tuple[int, int] | None = None) -> Statistics:
    """Measures an RGB image on a copy of 128 x 128 pixels; `size` is that of the whole where it has been shrunk."""
    width, height = size or image.size
    small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    luma = np.asarray(small.convert("L"))
    histogram = np.bincount(luma.ravel(), minlength=256) / luma.size
    used = histogram[histogram > 0]
    levels = luma.astype(np.float32)
    red, green, blue = np.moveaxis(np.asarray(small) >> 4, -1, 0).astype(np.uint16)
    colors = np.bincount((red << 8 | green << 4 | blue).ravel())
    across, down = np.abs(np.diff(levels, axis=1)), np.abs(np.diff(levels, axis=0))
    return Statistics(
        width=width,
        height=height,
        brightness=float(levels.mean() / 255),
        entropy=float(-(used * np.log2(used)).sum()) + 0.0,
        dominant=float(colors.max() / luma.size),
        flat=flatness(np.asarray(small.reduce(SIDE // CELLS)), levels),
        gradient=float(across.mean() + down.mean()) / 2,
        phash=perceptual_hash(in_cells(levels).mean(axis=(1, 3))),
    )


def in_cells(levels: np.ndarray) -> np.ndarray:
    size = SIDE // CELLS
    return levels.reshape(CELLS, size, CELLS, size)  # (row, y, column, x)


def _inner_cells() -> np.ndarray:
    inner = np.zeros((CELLS, CELLS), dtype=bool)
    inner[MARGIN:-MARGIN, MARGIN:-MARGIN] = True
    down, across = MARGIN + CORNER[0], MARGIN + CORNER[1]
    for rows in (slice(down), slice(-down, None)):
        for columns in (slice(across), slice(-across, None)):
            inner[rows, columns] = False
    return inner


INNER = _inner_cells()  # (32, 32)


def flatness(cells: np.ndarray, levels: np.ndarray) -> float:
    """Share of the inner cells that have no texture and, in each channel, lie within one window of TONE levels.

    `cells` is uint8 of (32, 32, 3), the cells' mean colours, and `levels` the luma, (128, 128). The mean over a cell
    takes noise away, the window leaves room for a slight vignette; a thin line stays as texture.
    """
    smooth = INNER & (in_cells(levels).std(axis=(1, 3)) < TEXTURE)
    shares = []
    for channel in range(3):
        below = np.cumsum(np.bincount(cells[smooth, channel], minlength=256 + TONE))  # cells of a level or less
        shares.append(int((below[TONE:] - np.concatenate(([0], below[: -TONE - 1]))).max()))
    return min(shares) / int(INNER.sum())


def _cosines() -> np.ndarray:
    """The 8 lowest rows of the orthonormal DCT-II of length 32."""
    frequency, position = np.arange(8)[:, None], np.arange(CELLS) + 0.5
    rows = np.cos(math.pi / CELLS * frequency * position) * math.sqrt(2 / CELLS)
    rows[0] /= math.sqrt(2)
    return rows


COSINES = _cosines()  # (8, 32)


def perceptual_hash(luma: np.ndarray) -> int:
    """pHash of a picture's luma, float of (32, 32): which of its 64 lowest DCT coefficients are above their median.

    As in N. Krawetz, "Looks Like It", 2011, and as ImageHash's `phash` has it: row by row, the first bit highest.
    """
    low = COSINES @ luma @ COSINES.T
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes())


def check(statistics: Statistics, limits: ScreeningConfig) -> None:
    """Raises Rejected for a picture of one colour, and for one whose inside is one flat tone."""
    if statistics.dominant >= limits.solid_color_fraction:
        raise Rejected(Reason.PLAIN, f"{statistics.dominant:.2%} of it in one colour")
    if statistics.flat >= limits.uniform_area_fraction:
        raise Rejected(Reason.NEAR_PLAIN, f"{statistics.flat:.2%} of its inside flat and of one tone")


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size` pixels, then the centre square."""
    return ImageOps.fit(image, (size, size), method=Image.Resampling.LANCZOS)


def thumbnail(image: Image.Image) -> bytes:
    """A JPEG of at most 64 pixels a side and about 2 kB."""
    small = image.copy()
    small.thumbnail((64, 64))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=60, optimize=True)
    return file.getvalue()


def digest(data: bytes) -> bytes:
    """16 bytes of SHA-256, the same for the same bytes alone."""
    return hashlib.sha256(data).digest()[:16]
