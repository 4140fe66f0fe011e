"""Open a source by its URL."""

from pathlib import Path

from pixart.data.sources.base import Source
from pixart.data.sources.demo import DemoSource
from pixart.data.sources.file_index import ALLOWED, IMAGE_SUFFIXES, find_files, suffix_of
from pixart.data.sources.folder import FolderSource


def open_source(
    url: str, *, images: int | None = None, seed: int = 0, image_size: int = 256, counts: Path | None = None
) -> Source:
    """Opens `demo` or the images at `url`: a folder, a file or a pattern such as `data/train-*.parquet`.

    `images` is how many rows to take at most, and for the demo, whose scenes of `seed` have `image_size` pixels
    a side, exactly. `counts` is a file that keeps how many rows each parquet or tar file has, so that only the
    first process that opens the source has to look into all of them.

    Raises ValueError for a source that does not exist, is empty or is of no kind that is known.
    """
    if images is not None and images < 1:
        raise ValueError(f"source {url!r}: images={images} must be at least 1")
    if url == "demo":
        if images is None:
            raise ValueError("source 'demo': images must say how many scenes it has, at least 1")
        return DemoSource(images, seed, image_size)
    files = find_files(url)
    kinds = sorted({kind for name in files.sizes if (kind := _kind(name))})
    if not kinds:
        raise ValueError(f"source {url!r}: has no images; {ALLOWED}")
    if len(kinds) > 1:
        raise ValueError(f"source {url!r}: mixes {' and '.join(kinds)} files, name one kind by a pattern; {ALLOWED}")
    if kinds == ["image"]:
        return FolderSource(files, images)
    if kinds == ["parquet"]:
        from pixart.data.sources.parquet import ParquetSource

        return ParquetSource(files.of(".parquet"), images, counts)
    from pixart.data.sources.webdataset import WebDatasetSource

    return WebDatasetSource(files.of(".tar"), images, counts)


def _kind(name: str) -> str | None:
    suffix = suffix_of(name)
    return "image" if suffix in IMAGE_SUFFIXES else suffix[1:] if suffix in (".parquet", ".tar") else None
