"""Image screening: decode a source item, measure it, and reject unusable images.

`decode` reads the file, `measure` computes statistics, and `check_uniformity` compares them with the limits. All are
pure functions, and cheap compared with the models that process the image later.
"""

import hashlib
import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps

from pixart.config.dataset import ScreeningConfig
from pixart.data.images.decoding import Reason, Rejected, decode, decode_downscaled

__all__ = [
    "ImageStatistics",
    "Reason",
    "Rejected",
    "check_uniformity",
    "decode",
    "decode_downscaled",
    "digest",
    "measure",
    "resize_and_crop",
    "thumbnail",
]

SIZE = 128  # pixels per side of the square copy that is measured
CELLS = 32  # cells per side, each of 4 x 4 pixels of the copy
MARGIN = 2  # cells at each edge, so that a border does not count as content
CORNER = (3, 6)  # further cells (down, across) at each corner, so that a logo does not count as content
TONE = 20  # levels of a channel: the range of one tone, widened for noise and vignetting
TEXTURE = 8.0  # levels: a cell is flat if the standard deviation of its luma is lower


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageStatistics:
    """Statistics of an image; all but width and height are measured on a copy of 128 x 128 pixels."""

    width: int
    height: int
    brightness: float  # mean luma, 0 to 1
    entropy: float  # bits of the luma histogram, 0 to 8
    dominant: float  # share of the pixels in the most common color, of 16 levels per channel
    flat: float  # share of the inner cells, excluding edges and corners, that are flat and of one tone
    gradient: float  # mean absolute difference of luma between adjacent pixels, levels of 255 per pixel
    phash: int  # 64 bits, see `perceptual_hash`


def measure(image: Image.Image, size: tuple[int, int] | None = None) -> ImageStatistics:
    """Measure an RGB image. `size` is the full size of an image that was decoded at reduced resolution."""
    width, height = size or image.size
    small = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    luma = np.asarray(small.convert("L"))
    histogram = np.bincount(luma.ravel(), minlength=256) / luma.size
    nonzero = histogram[histogram > 0]
    levels = luma.astype(np.float32)
    red, green, blue = np.moveaxis(np.asarray(small) >> 4, -1, 0).astype(np.uint16)
    colors = np.bincount((red << 8 | green << 4 | blue).ravel())
    across, down = np.abs(np.diff(levels, axis=1)), np.abs(np.diff(levels, axis=0))
    return ImageStatistics(
        width=width,
        height=height,
        brightness=float(levels.mean() / 255),
        entropy=float(-(nonzero * np.log2(nonzero)).sum()) + 0.0,
        dominant=float(colors.max() / luma.size),
        flat=flatness(np.asarray(small.reduce(SIZE // CELLS)), levels),
        gradient=float(across.mean() + down.mean()) / 2,
        phash=perceptual_hash(split_into_cells(levels).mean(axis=(1, 3))),
    )


def split_into_cells(levels: np.ndarray) -> np.ndarray:
    """Reshape (128, 128) to (cell row, y, cell column, x)."""
    size = SIZE // CELLS
    return levels.reshape(CELLS, size, CELLS, size)


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
    """Return the share of the inner cells that have no texture and lie within TONE levels of each other.

    `cells` are the mean colors of the cells, uint8 (32, 32, 3), and `levels` is the luma (128, 128). Averaging over a
    cell removes noise, and TONE tolerates slight vignetting; a thin line still counts as texture. Of the three
    channels, the lowest share is returned.
    """
    flat = INNER & (split_into_cells(levels).std(axis=(1, 3)) < TEXTURE)
    shares = []
    for channel in range(3):
        cumulative = np.cumsum(np.bincount(cells[flat, channel], minlength=256 + TONE))
        shares.append(int((cumulative[TONE:] - np.concatenate(([0], cumulative[: -TONE - 1]))).max()))
    return min(shares) / int(INNER.sum())


def _cosines() -> np.ndarray:
    """Return the 8 lowest-frequency rows of the orthonormal DCT-II matrix of size 32."""
    frequency, position = np.arange(8)[:, None], np.arange(CELLS) + 0.5
    rows = np.cos(math.pi / CELLS * frequency * position) * math.sqrt(2 / CELLS)
    rows[0] /= math.sqrt(2)
    return rows


COSINES = _cosines()  # (8, 32)


def perceptual_hash(luma: np.ndarray) -> int:
    """Return the 64-bit pHash of an image's luma, float (32, 32).

    Each bit states whether one of the 64 lowest DCT coefficients is above their median, row by row from the most
    significant bit (N. Krawetz, "Looks Like It", 2011; identical to `phash` of ImageHash).
    """
    low = COSINES @ luma @ COSINES.T
    return int.from_bytes(np.packbits(low > np.median(low)).tobytes())


def check_uniformity(statistics: ImageStatistics, limits: ScreeningConfig) -> None:
    """Raise Rejected if an image has a solid color, or if its inner area is flat and of one tone."""
    if statistics.dominant >= limits.solid_color_fraction:
        raise Rejected(Reason.SOLID_COLOR, f"{statistics.dominant:.2%} of the pixels have one color")
    if statistics.flat >= limits.uniform_area_fraction:
        raise Rejected(Reason.UNIFORM, f"{statistics.flat:.2%} of the inner area is flat and of one tone")


def resize_and_crop(image: Image.Image, height: int, width: int) -> Image.Image:
    """Resize an image so that it covers a shape in pixels, and crop its center."""
    return ImageOps.fit(image, (width, height), method=Image.Resampling.LANCZOS)


def thumbnail(image: Image.Image, pixels: int = 64) -> bytes:
    """Return a JPEG of at most `pixels` per side; at 64, about 2 kB."""
    small = image.copy()
    small.thumbnail((pixels, pixels))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=60, optimize=True)
    return file.getvalue()


def digest(data: bytes) -> bytes:
    """Return the first 16 bytes of the SHA-256 of an encoded image."""
    return hashlib.sha256(data).digest()[:16]
