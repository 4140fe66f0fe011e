"""Bytes of a source item to an image, or a reason why not.

An image passes three gates: `decode` reads it, `measure` says in numbers what it looks like, and `check` holds the
numbers against the limits. All three are pure, and fast beside any model that sees the image later.
"""

import hashlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from pixart.config import ScreeningConfig

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # no other parser sees the bytes
MAX_SCANS = 30  # of a progressive JPEG, each a pass over the whole picture; encoders write about ten
MAX_RLE_PIXELS = 4_000_000  # of a run-length coded BMP, which Pillow decodes in Python at 5 million a second

SIDE = 128  # pixels of the square copy that is measured
CELLS = 32  # cells a side, each of 4 x 4 of its pixels
MARGIN = 2  # cells at each edge, where a border is no content
CORNER = (3, 6)  # further cells (down, across) at each corner, where a logo is no content
TONE = 20  # levels of a channel: the width of one tone, as noise and vignetting spread it
TEXTURE = 8.0  # levels: a cell whose luma has less standard deviation is flat


class Reason(StrEnum):
    """Why an image is not used."""

    UNREADABLE = "unreadable"
    TRUNCATED = "truncated"
    TOO_MANY_PIXELS = "too many pixels"
    TOO_SMALL = "too small"
    EXTREME_ASPECT = "extreme aspect"
    PLAIN = "plain"
    NEAR_PLAIN = "near-plain"


class Rejected(Exception):  # noqa: N818 - a verdict on an image, not a failure of ours
    """An image that cannot be used: one of a few reasons, and in free words what was found."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else str(self.reason)


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


def decode(data: bytes, limits: ScreeningConfig) -> Image.Image:
    """Decodes the first frame, turns it upright and converts it to RGB; what is transparent becomes white.

    Raises Rejected for what no decoder reads to its end, and by the header alone for a size beyond the limits.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        check_size(*image.size, limits)
        LOADERS.get(str(image.format), load)(image, data)
        ImageOps.exif_transpose(image, in_place=True)
        return to_rgb(image)
    except Rejected:
        raise
    except Image.DecompressionBombError as error:
        raise Rejected(Reason.TOO_MANY_PIXELS, str(error)) from None
    except UnidentifiedImageError:
        raise Rejected(Reason.UNREADABLE, f"no header of {', '.join(FORMATS)}") from None
    except Exception as error:  # damaged bytes fail in as many ways as their reader has lines
        riff_is_cut = data.startswith(b"RIFF") and len(data) < 8 + int.from_bytes(data[4:8], "little")  # WebP
        truncated = riff_is_cut or "truncated" in str(error).lower()
        reason = Reason.TRUNCATED if truncated else Reason.UNREADABLE
        raise Rejected(reason, f"{type(error).__name__}: {error}") from None


def check_size(width: int, height: int, limits: ScreeningConfig) -> None:
    """Raises Rejected for a picture that is too large, too small or too long."""
    size = f"{width} x {height}"
    if width * height > limits.max_pixels:
        raise Rejected(Reason.TOO_MANY_PIXELS, size)
    if min(width, height) < limits.min_side:
        raise Rejected(Reason.TOO_SMALL, size)
    if max(width, height) > limits.max_aspect * min(width, height):
        raise Rejected(Reason.EXTREME_ASPECT, size)


def load(image: ImageFile, data: bytes) -> None:
    image.load()


def load_jpeg(image: ImageFile, data: bytes) -> None:
    """Raises Rejected for a JPEG of endless scans, and for one that ends early but properly.

    libjpeg fills what such a file lacks with the last colour and says nothing. So where the last 8 pixels are of one
    colour, the file is decoded again with some bytes between its scans and its end: a whole one does not notice.
    """
    assert image.fp is not None
    begin = image.fp.tell()  # of the first scan
    end = data.find(b"\xff\xd9", begin)  # cannot occur inside a scan
    scans = 1 + data.count(b"\xff\xda", begin, end)
    if scans > MAX_SCANS:
        raise Rejected(Reason.UNREADABLE, f"{scans} scans")
    image.load()
    if image.crop((max(0, image.width - 8), image.height - 1, *image.size)).getcolors(1):
        longer = Image.open(io.BytesIO(data[:end] + b"\x55" * 1024 + data[end:]), formats=["JPEG"])
        if longer.tobytes() != image.tobytes():
            raise Rejected(Reason.TRUNCATED, "the scans end before the picture does")


def load_png(image: ImageFile, data: bytes) -> None:
    """Verifies the checksums, which Pillow's decoder passes over."""
    Image.open(io.BytesIO(data), formats=["PNG"]).verify()
    image.load()


def load_bmp(image: ImageFile, data: bytes) -> None:
    if image.tile[0].codec_name == "bmp_rle" and image.width * image.height > MAX_RLE_PIXELS:
        raise Rejected(Reason.TOO_MANY_PIXELS, f"{image.width} x {image.height}, run-length coded")
    image.load()


LOADERS: dict[str | None, Callable[[ImageFile, bytes], None]] = {"JPEG": load_jpeg, "PNG": load_png, "BMP": load_bmp}


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any mode to RGB. Raises Rejected for numbers whose range is not known."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # Pillow's own conversion clips at 255
    if image.mode in ("I", "F"):
        raise Rejected(Reason.UNREADABLE, f"pixels of mode {image.mode}, whose range is not known")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(layer, mask=layer)
    return white


def measure(image: Image.Image) -> Statistics:
    """Measures an RGB image on a copy of 128 x 128 pixels."""
    small = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
    luma = np.asarray(small.convert("L"))
    histogram = np.bincount(luma.ravel(), minlength=256) / luma.size
    used = histogram[histogram > 0]
    levels = luma.astype(np.float32)
    red, green, blue = np.moveaxis(np.asarray(small) >> 4, -1, 0).astype(np.uint16)
    colors = np.bincount((red << 8 | green << 4 | blue).ravel())
    across, down = np.abs(np.diff(levels, axis=1)), np.abs(np.diff(levels, axis=0))
    return Statistics(
        width=image.width,
        height=image.height,
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
    if statistics.dominant >= limits.plain:
        raise Rejected(Reason.PLAIN, f"{statistics.dominant:.2%} of it in one colour")
    if statistics.flat >= limits.near_plain:
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
