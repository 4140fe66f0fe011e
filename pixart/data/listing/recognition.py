"""Recognition of images among files whose suffix does not say what they are."""

import io
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from PIL import Image

from pixart.data.listing.file_list import IMAGE_SUFFIXES, suffix_of

# Formats of Pillow that are decoded, in the order in which they are tried. Its other parsers are never used.
RECOGNIZED = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000")  # by their first bytes
FORMATS = (*RECOGNIZED, "DIB", "SGI", "PCX", "TGA")
HEAD = 1 << 16  # bytes of a file that show whether it is an image
FILES = 64  # whose first bytes are read together
# Files of these suffixes are not opened to find out whether they are images.
OTHER_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("txt", "text", "caption", "json", "jsonl", "csv", "tsv", "md", "rst", "html", "xml", "yaml", "yml", "toml"),
        *("parquet", "arrow", "npy", "npz", "pt", "pth", "pkl", "safetensors", "bin", "mat", "h5", "hdf5", "sqlite"),
        *("tar", "zip", "gz", "tgz", "bz2", "xz", "zst", "7z", "py", "sh", "log", "lock", "pdf", "svg", "mp4", "webm"),
        *("cls", "db", "ini", "tfrecord", "rar", "mp3", "wav", "mov", "avi", "mkv", "psd", "ds_store"),
    )
)


def is_unknown(name: str, size: int) -> bool:
    """Return whether only the content of a file says whether it is an image."""
    suffix = suffix_of(name)
    return size != 0 and suffix not in IMAGE_SUFFIXES and suffix not in OTHER_SUFFIXES


def recognized(system: Any, root: str, files: Iterable[tuple[str, int]]) -> Iterator[tuple[str, int, bool]]:
    """Yield the name and the size of each file, and whether its content is that of an image."""
    remaining = iter(files)
    while some := list(islice(remaining, FILES)):
        heads = system.cat_ranges([f"{root}/{name}" for name, _ in some], 0, HEAD, on_error="return")
        for (name, size), head in zip(some, heads, strict=True):
            yield name, size, isinstance(head, bytes) and is_image(head)


def is_image(head: bytes) -> bool:
    """Return whether Pillow recognizes the first bytes of a file as an image."""
    try:
        Image.open(io.BytesIO(head), formats=RECOGNIZED)
    except Exception:  # of an unknown format, or damaged: parsers raise almost any
        return False
    return True
