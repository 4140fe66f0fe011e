"""Bytes of a source item to an image, or a reason why not."""

import io

from PIL import Image, ImageOps, UnidentifiedImageError

MAX_PIXELS = 178_956_970  # Pillow's own limit for a decompression bomb


class Rejected(Exception):  # noqa: N818 - a verdict on an image, not a failure of ours
    """An image that cannot be used; the message is the reason as it is stored."""


def decode(data: bytes) -> Image.Image:
    """Decodes, turns upright and converts to RGB. Raises Rejected for what no decoder reads to its end."""
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise Rejected("too many pixels")
        image.load()
        return ImageOps.exif_transpose(image).convert("RGB")
    except Image.DecompressionBombError:
        raise Rejected("too many pixels") from None
    except UnidentifiedImageError:
        raise Rejected("not an image") from None
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three for damaged files
        raise Rejected(f"damaged: {error}") from None


def resize_and_crop(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size` pixels, then the centre square."""
    return ImageOps.fit(image, (size, size), method=Image.Resampling.LANCZOS)
