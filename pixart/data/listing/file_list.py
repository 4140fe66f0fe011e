"""The files of a source by name, and what their names say about them."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jpx", ".tga", ".pcx", ".sgi"),
)
SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "evaluation")
ALLOWED = (
    "a source must be `demo`, or the path or fsspec URL of an image folder (.jpg, .png, .webp and others), "
    "of .parquet files or of uncompressed .tar files"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileList:
    """Files of one file system by their names relative to `root`, sorted."""

    url: str
    system: Any  # fsspec.AbstractFileSystem
    root: str
    sizes: dict[str, int]  # bytes, -1 if the file system does not report it
    left_out: Counter[str] = field(default_factory=Counter)  # files that are not listed, by reason

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"


def suffix_reason(name: str) -> str:
    """Return the reason for leaving out a file that is no image, which can be shown whatever its name is."""
    suffix = suffix_of(name)[1:]
    if not suffix:
        return "no suffix"
    return f"suffix .{suffix}" if suffix.isascii() and suffix.isalnum() and len(suffix) < 16 else "other suffix"


def suffix_of(name: str) -> str:
    return PurePosixPath(name).suffix.lower()
