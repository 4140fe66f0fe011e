"""Strict decoding of image files.

Pillow tolerates damaged files where it can. This module rejects files that Pillow would decode only partly, and
decompression bombs that would take minutes or gigabytes.
"""

import io
import math
import re
import zlib
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from pixart.config.dataset import ScreeningConfig
from pixart.data.listing.recognition import FORMATS

MAX_SCANS = 30  # of a progressive JPEG, each a pass over the whole image; encoders write about ten
PADDING = b"\0" + 1023 * b"\x55"  # scan data that contains no marker, even after a 0xff
FILLINGS = (1024 * b"\x55", 1024 * b"\xaa", 1024 * b"\xff\0")  # scan data whose bits differ from the zeros of no data
SCAN_HEADER = re.compile(rb"\xff\xda..(.)", re.DOTALL)  # ends with the number of components
END_MARKER = b"\xff\xd9"  # of a JPEG, which cannot occur inside a scan
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_CHUNKS = (b"tRNS", b"eXIf")  # ancillary ones that pixels and orientation depend on
MAX_TEXT = 1 << 16  # bytes of a text chunk that is kept
MAX_SLOW_PIXELS = 4_000_000  # of an image that Pillow decodes in Python, at 5 million pixels/s
SLOW_CODECS = ("bmp_rle", "ppm", "ppm_plain")


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
        data = without_metadata(data) if data.startswith(PNG_SIGNATURE) else data
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.format == "MPO":  # several JPEGs in one file, written by phones and stereo cameras; use the first
            image = JpegImageFile(io.BytesIO(data))
        check_size(*image.size, limits)
        if isinstance(image, JpegImageFile):
            image, data = with_end_marker(image, data)
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


def with_end_marker(image: JpegImageFile, data: bytes) -> tuple[JpegImageFile, bytes]:
    """Return an opened JPEG and its data with an end marker, which some cameras and downloads leave out.

    A file that has all of its scan data decodes to the same pixels whatever follows. Raises Rejected for any other.
    """
    begin = first_scan(image, data)
    if data.find(END_MARKER, begin) >= 0:
        return image, data
    check_scans(data[begin:])
    stuffing = b"\0" if data.endswith(b"\xff") else b""
    pixels = {JpegImageFile(io.BytesIO(data + stuffing + end + END_MARKER)).tobytes() for end in (b"", *FILLINGS)}
    if len(pixels) > 1:
        raise Rejected(Reason.TRUNCATED, "the file ends before its image does")
    return JpegImageFile(io.BytesIO(data + END_MARKER)), data + END_MARKER


def first_scan(image: JpegImageFile, data: bytes) -> int:
    """Return the offset of the header of an opened JPEG's first scan."""
    assert image.fp is not None
    return data.rfind(b"\xff\xda", 0, image.fp.tell())


def check_scans(scans: bytes) -> None:
    """Raise Rejected if a JPEG has too many scans."""
    if (count := scans.count(b"\xff\xda")) > MAX_SCANS:
        raise Rejected(Reason.UNREADABLE, f"{count} scans")


def load_jpeg(image: ImageFile, data: bytes) -> None:
    """Load a JPEG. Raises Rejected if it has too many scans, or if its scans end before the image does.

    libjpeg fills missing scan data with the last color without an error. If the last 8 pixels have a single color,
    the file is therefore decoded again with padding before its end marker: only a truncated image changes.
    """
    assert isinstance(image, JpegImageFile)
    begin = first_scan(image, data)
    end = data.find(END_MARKER, begin)
    check_scans(data[begin:end])
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


def without_metadata(data: bytes) -> bytes:
    """Return a PNG without the chunks that its pixels do not depend on, of which Pillow refuses large ones.

    A wrong checksum there is of no concern; a chunk of transparency or EXIF data with one is left out too. Of texts,
    XMP and EXIF data stay, which may have the orientation. What follows a truncated chunk is not changed.
    """
    kept, offset = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while offset + 12 <= len(data):
        end = offset + 12 + int.from_bytes(data[offset : offset + 4])
        kind, body = data[offset + 4 : offset + 8], data[offset + 8 : end - 4]
        if end > len(data):
            break
        is_orientation = len(body) < MAX_TEXT and body.startswith((b"Raw profile type exif\0", b"XML:com.adobe.xmp\0"))
        is_critical = kind[:1].isupper()
        is_sound = zlib.crc32(data[offset + 4 : end - 4]) == int.from_bytes(data[end - 4 : end])
        if is_critical or (is_sound and (kind in PNG_CHUNKS or is_orientation)):
            kept.append(data[offset:end])
        offset = end
        if kind == b"IEND":
            return b"".join(kept)
    return b"".join([*kept, data[offset:]])


def load_png(image: ImageFile, data: bytes) -> None:
    """Load a PNG and verify its checksums, which Pillow's decoder ignores."""
    PngImageFile(io.BytesIO(data)).verify()
    image.load()


def load_slow(image: ImageFile, data: bytes) -> None:
    """Load a BMP or a PPM. Raises Rejected if a run-length encoded or textual one would take long to decode."""
    codecs = {tile.codec_name for tile in image.tile}
    if codecs & set(SLOW_CODECS) and image.width * image.height > MAX_SLOW_PIXELS:
        raise Rejected(Reason.TOO_MANY_PIXELS, f"{image.width} x {image.height}, {codecs.pop()}")
    image.load()


LOADERS: dict[str | None, Callable[[ImageFile, bytes], None]] = {
    "JPEG": load_jpeg,
    "PNG": load_png,
    **dict.fromkeys(("BMP", "DIB", "PPM"), load_slow),
}


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
