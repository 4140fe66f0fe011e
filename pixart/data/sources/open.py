"""Opening of image sources by URL."""

import io
from pathlib import Path, PurePosixPath

from PIL import Image

from pixart.config.dataset import ColumnsConfig
from pixart.data.sources.base import Source
from pixart.data.sources.demo import DemoSource
from pixart.data.sources.file_index import ALLOWED, IMAGE_SUFFIXES, FileList, list_files, suffix_of
from pixart.data.sources.folder import FolderSource
from pixart.data.sources.metadata import NAMES as METADATA

HEAD = 1 << 16  # bytes of a file that show whether it is an image
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
# Files of these suffixes are not opened to find out whether they are images.
OTHER_SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in (
        *("txt", "text", "caption", "json", "jsonl", "csv", "tsv", "md", "rst", "html", "xml", "yaml", "yml", "toml"),
        *("parquet", "arrow", "npy", "npz", "pt", "pth", "pkl", "safetensors", "bin", "mat", "h5", "hdf5", "sqlite"),
        *("tar", "zip", "gz", "tgz", "bz2", "xz", "zst", "7z", "py", "sh", "log", "lock", "pdf", "svg", "mp4", "webm"),
    )
)


def open_source(
    url: str,
    *,
    max_images: int | None = None,
    seed: int = 0,
    image_size: int = 256,
    counts_file: Path | None = None,
    columns: ColumnsConfig | None = None,
) -> Source:
    """Open `demo` or the images at `url`: a folder, a file or a pattern such as `data/train-*.parquet`.

    `max_images` limits the number of rows; the demo has exactly this number of scenes, rendered from `seed` with
    `image_size` pixels per side. Other sources choose one caption of several by `seed`. `counts_file` stores the number
    of rows of each parquet or tar file, so that only the first process that opens the source has to open all of them.
    `columns` names columns where no common name does.

    Raises ValueError if the source does not exist, is empty or is of an unknown kind.
    """
    if max_images is not None and max_images < 1:
        raise ValueError(f"source {url!r}: the number of images is {max_images}; it must be at least 1")
    if url == "demo":
        if max_images is None:
            raise ValueError("source 'demo': the number of images is not set; it must be at least 1")
        return DemoSource(max_images, seed, image_size)
    files, columns = list_files(url), columns or ColumnsConfig()
    images = image_names(files)
    kinds = {"image": images} if images else {}
    kinds |= {kind: names for kind in ("parquet", "tar") if (names := list(files.with_suffix(f".{kind}").sizes))}
    if images and (tables := [name for name in kinds.get("parquet", []) if PurePosixPath(name).name not in METADATA]):
        kinds["parquet"] = tables
    elif images:
        kinds.pop("parquet", None)
    if "parquet" in kinds and len(kinds) > 1:
        from pixart.data.sources.columns import image_storage

        storage = image_storage(files.with_suffix(".parquet"), columns)
        if storage is None:  # such as the table that img2dataset writes beside its images
            del kinds["parquet"]
        elif storage == "path":
            kinds.pop("image", None)  # they are the files that the rows name
    if not kinds:
        raise ValueError(f"source {url!r}: contains no images; {ALLOWED}")
    if len(kinds) > 1:
        raise ValueError(f"source {url!r}: contains {' and '.join(kinds)} files; select one kind by a pattern")
    if "image" in kinds:
        return FolderSource(files, images, max_images, seed, columns)
    if "parquet" in kinds:
        from pixart.data.sources.parquet import ParquetSource

        return ParquetSource(files.with_suffix(".parquet"), max_images, counts_file, seed, columns)
    from pixart.data.sources.webdataset import WebDatasetSource

    return WebDatasetSource(files.with_suffix(".tar"), max_images, counts_file, seed, columns)


def image_names(files: FileList) -> list[str]:
    """Return the files that are images by their suffix or, where it is unknown or missing, by their content."""
    unknown = [name for name in files.sizes if suffix_of(name) not in OTHER_SUFFIXES | set(IMAGE_SUFFIXES)]
    heads = files.system.cat_ranges([files.path(name) for name in unknown], 0, HEAD, on_error="return")
    recognized = {name for name, head in zip(unknown, heads, strict=True) if isinstance(head, bytes) and is_image(head)}
    return [name for name in files.sizes if suffix_of(name) in IMAGE_SUFFIXES or name in recognized]


def is_image(head: bytes) -> bool:
    """Return whether Pillow recognizes the first bytes of a file as an image."""
    try:
        Image.open(io.BytesIO(head), formats=FORMATS)
    except Exception:  # of an unknown format, or damaged: parsers raise almost any
        return False
    return True
