"""Opening of image sources by URL."""

from pathlib import Path

from pixart.data.sources.base import Source
from pixart.data.sources.demo import DemoSource
from pixart.data.sources.file_index import ALLOWED, IMAGE_SUFFIXES, list_files, suffix_of
from pixart.data.sources.folder import FolderSource


def open_source(
    url: str, *, max_images: int | None = None, seed: int = 0, image_size: int = 256, counts_file: Path | None = None
) -> Source:
    """Open `demo` or the images at `url`: a folder, a file or a pattern such as `data/train-*.parquet`.

    `max_images` limits the number of rows; the demo has exactly this number of scenes, rendered from `seed` with
    `image_size` pixels per side. `counts_file` stores the number of rows of each parquet or tar file, so that only
    the first process that opens the source has to open all of them.

    Raises ValueError if the source does not exist, is empty or is of an unknown kind.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"source {url!r}: the number of images is {max_images}; it must be at least 1")
    if url == "demo":
        if max_images is None:
            raise ValueError("source 'demo': the number of images is not set; it must be at least 1")
        return DemoSource(max_images, seed, image_size)
    files = list_files(url)
    kinds = sorted({kind for name in files.sizes if (kind := _kind(name))})
    if not kinds:
        raise ValueError(f"source {url!r}: contains no images; {ALLOWED}")
    if len(kinds) > 1:
        raise ValueError(f"source {url!r}: contains {' and '.join(kinds)} files; select one kind by a pattern")
    if kinds == ["image"]:
        return FolderSource(files, max_images)
    if kinds == ["parquet"]:
        from pixart.data.sources.parquet import ParquetSource

        return ParquetSource(files.with_suffix(".parquet"), max_images, counts_file)
    from pixart.data.sources.webdataset import WebDatasetSource

    return WebDatasetSource(files.with_suffix(".tar"), max_images, counts_file, seed)


def _kind(name: str) -> str | None:
    """Return image, parquet or tar, or None for a file that no source reads."""
    suffix = suffix_of(name)
    return "image" if suffix in IMAGE_SUFFIXES else suffix[1:] if suffix in (".parquet", ".tar") else None
