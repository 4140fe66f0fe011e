"""Image files, decoded whole or not at all.

Pillow reads on where it can. What it passes over in silence, and what would keep it busy for minutes, is refused here.
"""

import io
import math
import re
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from pixart.config.dataset import ScreeningConfig

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # no other parser sees the bytes
MAX_SCANS = 30  # of a progressive JPEG, each a pass over the whole picture; encoders write about ten
PADDING = b"\0" + 1023 * b"\x55"  # scan data and no marker, even where an 0xff precedes it
SCAN_HEADER = re.compile(rb"\xff\xda..(.)", re.DOTALL)  # up to the number of components
MAX_RLE_PIXELS = 4_000_000  # of a run-length coded BMP, which Pillow decodes in Python at 5 million a second


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


def decode(data: bytes, limits: ScreeningConfig) -> Image.Image:
    """Decodes the first frame, turns it upright and converts it to RGB; what is transparent becomes white.

    Raises Rejected for what no decoder reads to its end, and by the header alone for a size beyond the limits.
    """
    return decode_shrunk(data, limits, lambda *sides: 1)[0]


def decode_shrunk(
    data: bytes, limits: ScreeningConfig, share: Callable[[int, int], float]
) -> tuple[Image.Image, tuple[int, int]]:
    """As `decode`, at a half, a fourth or an eighth of its sides where that leaves a `share` of them, and the whole's
    size.

    Only JPEG's coding allows it; of a large one, most of the work is saved, and it is read to its end all the same.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.format == "MPO":  # several JPEGs in one file, as phones and stereo cameras write; the first is it
            image = JpegImageFile(io.BytesIO(data))
        check_size(*image.size, limits)
        whole, wanted = image.size, min(1.0, share(*image.size))
        image.draft(None, (math.ceil(wanted * image.width), math.ceil(wanted * image.height)))
        shrunk = image.size
        LOADERS.get(image.format, lambda image, data: image.load())(image, data)
        upright = turned_upright(image)
        return to_rgb(upright), whole if upright.size == shrunk else whole[::-1]
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


def load_jpeg(image: ImageFile, data: bytes) -> None:
    """Raises Rejected for a JPEG of too many scans, and for one that ends properly but early.

    libjpeg fills what such a file lacks with the last colour and says nothing. So where the last 8 pixels are of one
    colour, the file is decoded again with some bytes between its scans and its end: a whole one does not notice.
    """
    assert isinstance(image, JpegImageFile)
    assert image.fp is not None
    begin = data.rfind(b"\xff\xda", 0, image.fp.tell())  # of the first scan's header
    end = data.find(b"\xff\xd9", begin)  # cannot occur inside a scan
    scans = data.count(b"\xff\xda", begin, end)
    if scans > MAX_SCANS:
        raise Rejected(Reason.UNREADABLE, f"{scans} scans")
    image.load()
    if "progressive" in image.info and not has_all_bits(data[begin:end], len(image.layer)):
        raise Rejected(Reason.TRUNCATED, "the last scans are not there")
    if image.crop((max(0, image.width - 8), image.height - 1, *image.size)).getcolors(1):
        longer, scale = JpegImageFile(io.BytesIO(data[:end] + PADDING + data[end:])), image.decoderconfig[0]
        longer.draft(None, (longer.width // scale, longer.height // scale))
        if longer.tobytes() != image.tobytes():
            raise Rejected(Reason.TRUNCATED, "the scans end before the picture does")


def has_all_bits(scans: bytes, components: int) -> bool:
    """Whether a progressive JPEG's scans carry all 64 coefficients of every component to the last bit (T.81, B.2.3)."""
    done: set[tuple[int, int]] = set()
    for header in SCAN_HEADER.finditer(scans):
        chosen = scans[header.end() : header.end() + 2 * header[1][0] + 3]  # (component, tables)*, first, last, bits
        first, last, bits = chosen[-3:]
        if bits & 15 == 0:
            done |= {(component, index) for component in chosen[:-3:2] for index in range(first, last + 1)}
    return len(done) == 64 * components


def load_png(image: ImageFile, data: bytes) -> None:
    """Verifies the checksums, which Pillow's decoder passes over."""
    PngImageFile(io.BytesIO(data)).verify()
    image.load()


def load_bmp(image: ImageFile, data: bytes) -> None:
    if image.tile[0].codec_name == "bmp_rle" and image.width * image.height > MAX_RLE_PIXELS:
        raise Rejected(Reason.TOO_MANY_PIXELS, f"{image.width} x {image.height}, run-length coded")
    image.load()


LOADERS: dict[str | None, Callable[[ImageFile, bytes], None]] = {"JPEG": load_jpeg, "PNG": load_png, "BMP": load_bmp}


def turned_upright(image: ImageFile) -> ImageFile:
    """As its EXIF orientation says; a damaged EXIF block says nothing."""
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    return image


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
