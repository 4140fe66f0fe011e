"""Strict decoding of image files.

Pillow tolerates damaged files where it can. This module rejects files that Pillow would decode only partly, and
decompression bombs that would take minutes or gigabytes.
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

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow's other parsers are never used
MAX_SCANS = 30  # of a progressive JPEG, each a pass over the whole image; encoders write about ten
PADDING = b"\0" + 1023 * b"\x55"  # scan data that contains no marker, even after a 0xff
SCAN_HEADER = re.compile(rb"\xff\xda..(.)", re.DOTALL)  # ends with the number of components
MAX_RLE_PIXELS = 4_000_000  # of a run-length encoded BMP, which Pillow decodes in Python at 5 million pixels/s


class Reason(StrEnum):
    """Reasons why a source item is rejected. The values are stored in caption parts and must not change."""

    UNREADABLE = "unreadable"
    TRUNCATED = "truncated"
    TOO_MANY_PIXELS = "too many pixels"
    TOO_SMALL = "too small"
    EXTREME_ASPECT = "extreme aspect"
    SOLID_COLOR = "plain"
    UNIFORM = "near-plain"
    UNREADABLE_LABEL = "unreadable label"
    UNREADABLE_TEXT = "unreadable text"
    NO_WORDS = "no words"


class Rejected(Exception):  # noqa: N818 - a screening result, not a failure
    """An image was rejected for a `reason`; `detail` describes the measured value or the decoder's error."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else str(self.reason)


def decode(data: bytes, limits: ScreeningConfig) -> Image.Image:
    """Decode the first frame of an image file to RGB, upright and on a white background.

    Raises Rejected if the size in the header violates the limits, before any pixel is decoded, or if the file is
    truncated or otherwise unreadable.
    """
    return decode_downscaled(data, limits, lambda *sides: 1)[0]


def decode_downscaled(
    data: bytes, limits: ScreeningConfig, min_scale: Callable[[int, int], float]
) -> tuple[Image.Image, tuple[int, int]]:
    """Decode an image file at reduced resolution; return the image and its full size.

    JPEG files are decoded at 1/2, 1/4 or 1/8 of their sides, the smallest scale that is at least
    `min_scale(width, height)`. This skips most of the work for large images, while the file is still read to its end.
    Other formats are decoded at full resolution. Raises Rejected like `decode`.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.format == "MPO":  # several JPEGs in one file, written by phones and stereo cameras; use the first
            image = JpegImageFile(io.BytesIO(data))
        check_size(*image.size, limits)
        full_size, scale = image.size, min(1.0, min_scale(*image.size))
        image.draft(None, (math.ceil(scale * image.width), math.ceil(scale * image.height)))
        draft_size = image.size
        LOADERS.get(image.format, lambda image, data: image.load())(image, data)
        upright = apply_exif_orientation(image)
        return to_rgb(upright), full_size if upright.size == draft_size else full_size[::-1]
    except Rejected:
        raise
    except Image.DecompressionBombError as error:
        raise Rejected(Reason.TOO_MANY_PIXELS, str(error)) from None
    except UnidentifiedImageError:
        raise Rejected(Reason.UNREADABLE, f"not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file") from None
    except Exception as error:  # decoders raise almost any exception for damaged data
        truncated_riff = data.startswith(b"RIFF") and len(data) < 8 + int.from_bytes(data[4:8], "little")  # WebP
        truncated = truncated_riff or "truncated" in str(error).lower()
        reason = Reason.TRUNCATED if truncated else Reason.UNREADABLE
        raise Rejected(reason, f"{type(error).__name__}: {error}") from None


def check_size(width: int, height: int, limits: ScreeningConfig) -> None:
    """Check the size of an image. Raises Rejected if it has too many pixels, is too small or is too elongated."""
    size = f"{width} x {height}"
    if width * height > limits.max_pixels:
        raise Rejected(Reason.TOO_MANY_PIXELS, size)
    if min(width, height) < limits.min_side:
        raise Rejected(Reason.TOO_SMALL, size)
    if max(width, height) > limits.max_aspect * min(width, height):
        raise Rejected(Reason.EXTREME_ASPECT, size)


def load_jpeg(image: ImageFile, data: bytes) -> None:
    """Load a JPEG. Raises Rejected if it has too many scans, or if its scans end before the image does.

    libjpeg fills missing scan data with the last color without an error. If the last 8 pixels have a single color,
    the file is therefore decoded again with padding before its end marker: only a truncated image changes.
    """
    assert isinstance(image, JpegImageFile)
    assert image.fp is not None
    begin = data.rfind(b"\xff\xda", 0, image.fp.tell())  # the first scan's header
    end = data.find(b"\xff\xd9", begin)  # the end marker, which cannot occur inside a scan
    scans = data.count(b"\xff\xda", begin, end)
    if scans > MAX_SCANS:
        raise Rejected(Reason.UNREADABLE, f"{scans} scans")
    image.load()
    if "progressive" in image.info and not has_all_coefficients(data[begin:end], len(image.layer)):
        raise Rejected(Reason.TRUNCATED, "the last scans are missing")
    if image.crop((max(0, image.width - 8), image.height - 1, *image.size)).getcolors(1):
        padded, scale = JpegImageFile(io.BytesIO(data[:end] + PADDING + data[end:])), image.decoderconfig[0]
        padded.draft(None, (padded.width // scale, padded.height // scale))
        if padded.tobytes() != image.tobytes():
            raise Rejected(Reason.TRUNCATED, "the scans end before the image does")


def has_all_coefficients(scans: bytes, components: int) -> bool:
    """Return whether a progressive JPEG's scans include all 64 coefficients of every component to the last bit.

    The scan header is specified in ITU-T T.81, section B.2.3.
    """
    complete: set[tuple[int, int]] = set()
    for header in SCAN_HEADER.finditer(scans):
        parameters = scans[
            header.end() : header.end() + 2 * header[1][0] + 3
        ]  # (component, tables)*, first, last, bits
        first, last, bits = parameters[-3:]
        if bits & 15 == 0:
            complete |= {(component, index) for component in parameters[:-3:2] for index in range(first, last + 1)}
    return len(complete) == 64 * components


def load_png(image: ImageFile, data: bytes) -> None:
    """Load a PNG and verify its checksums, which Pillow's decoder ignores."""
    PngImageFile(io.BytesIO(data)).verify()
    image.load()


def load_bmp(image: ImageFile, data: bytes) -> None:
    """Load a BMP. Raises Rejected if a run-length encoded one would take long to decode."""
    if image.tile[0].codec_name == "bmp_rle" and image.width * image.height > MAX_RLE_PIXELS:
        raise Rejected(Reason.TOO_MANY_PIXELS, f"{image.width} x {image.height}, run-length encoded")
    image.load()


LOADERS: dict[str | None, Callable[[ImageFile, bytes], None]] = {"JPEG": load_jpeg, "PNG": load_png, "BMP": load_bmp}


def apply_exif_orientation(image: ImageFile) -> ImageFile:
    """Rotate an image according to its EXIF orientation; a damaged EXIF block is ignored."""
    with suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB. Raises Rejected for modes whose value range is unknown."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # Pillow's conversion clips at 255
    if image.mode in ("I", "F"):
        raise Rejected(Reason.UNREADABLE, f"pixels of mode {image.mode}, whose value range is unknown")
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(layer, mask=layer)
    return white
