"""PNG files that contain how they were made, one text chunk per setting. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

XMP_CHUNK = "XML:com.adobe.xmp"  # keyword of XMP in PNG, "XMP specification part 3", 1.1.5


def save_png(image: Image.Image, path: Path, settings: Mapping[str, str]) -> None:
    """Save an image as PNG with one text chunk per setting."""
    image.save(path, pnginfo=text_chunks(settings))


def text_chunks(settings: Mapping[str, str]) -> PngInfo:
    """Return one text chunk of a PNG per setting."""
    text = PngInfo()
    for name, value in settings.items():
        text.add_text(name, value)
    return text
