"""Images that generated ones are compared with: of a dataset, of a folder, or the statistics of an earlier evaluation.

Imports nothing heavy at its top, so that the launcher can check a reference before anything is computed.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from pixart import records
from pixart.records import Count

if TYPE_CHECKING:
    from PIL import Image

    from pixart.data.manifest import Manifest

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"))
METADATA = "metadata"  # array in a file of statistics with JSON: how the features were made
HASH_DIGITS = 16
MAX_ASPECT = 100.0  # longer over shorter side; training screens out less extreme ones, a reference is not screened


def list_images(folder: Path) -> list[Path]:
    """Return the image files in a folder and its subfolders, sorted by name. Raises ValueError without any."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise ValueError(
            f"--reference {folder}: holds no images; name a dataset, a folder of images or a statistics file"
        )
    return files


def folder_hash(files: list[Path]) -> str:
    """Return a hash of the names and sizes of image files."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    return digest.hexdigest()[:HASH_DIGITS]


def spaced(count: int, limit: int) -> list[int]:
    """Return at most `limit` of `count` rows, evenly spaced, so that every class of a sorted source is among them."""
    chosen = min(count, limit)
    return [index * count // chosen for index in range(chosen)]


class StatisticsRecord(TypedDict):
    """How the features of a statistics file were made."""

    features: str
    features_hash: str
    resize: str
    image_size: Count
    hash: str
    count: Count


def read_metadata(path: Path) -> dict[str, Any]:
    """Return how the features of a statistics file were made. Raises ValueError if it is another kind of file."""
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            metadata = records.parse(str(file[METADATA]), StatisticsRecord, str(path))
        return {key: metadata[key] for key in StatisticsRecord.__annotations__}
    except (OSError, ValueError, KeyError, EOFError, TypeError):
        raise ValueError(
            f"--reference {path}: is no statistics file; name the reference.npz of an evaluation, a dataset or a folder"
        ) from None


def check_metadata(path: Path, metadata: Mapping[str, Any], **expected: Any) -> None:
    """Raise ValueError if the features of a statistics file were made in another way than `expected` says."""
    for name, value in expected.items():
        if metadata[name] != value:
            raise ValueError(
                f"--reference {path}: was made with {name}={metadata[name]!r}, and this evaluation has {value!r}; "
                "name a reference of the same protocol, or its images"
            )


def folder_images(folder: Path, rows: range, limit: int, size: int) -> Iterator[tuple[int, "Image.Image"]]:
    """Yield the readable images among `rows` of the evenly spaced ones of a folder, as squares of `size` pixels."""
    files = list_images(folder)
    chosen = spaced(len(files), limit)
    yield from squares(((row, files[chosen[row]].read_bytes()) for row in rows), size)


def dataset_images(manifest: "Manifest", rows: range, limit: int) -> Iterator[tuple[int, "Image.Image"]]:
    """Yield the readable images among `rows` of the evenly spaced ones of a dataset, cropped as for training."""
    from pixart.data.manifest import open_images

    source = open_images(manifest)
    chosen = spaced(len(source), limit)

    def items() -> Iterator[tuple[int, bytes]]:
        if len(chosen) == len(source):  # every row: read them as one range
            for row, item in zip(rows, source.read(rows.start, rows.stop), strict=True):
                yield row, item.data
            return
        for row in rows:
            (item,) = source.read(chosen[row], chosen[row] + 1)
            yield row, item.data

    yield from squares(items(), manifest.data.image_size)


def squares(files: Iterator[tuple[int, bytes]], size: int) -> Iterator[tuple[int, "Image.Image"]]:
    """Decode image files and crop them to squares of `size` pixels in background threads; skip unreadable ones."""
    from pixart.config.dataset import ScreeningConfig
    from pixart.data.images.screening import Rejected, decode_downscaled, resize_and_crop
    from pixart.data.prefetch import prefetch_map

    def prepare(numbered: tuple[int, bytes]) -> tuple[int, "Image.Image | None"]:
        row, data = numbered
        try:
            image, _ = decode_downscaled(
                data, ScreeningConfig(min_side=1, max_aspect=MAX_ASPECT), lambda *sides: 2 * size / min(sides)
            )
        except Rejected:
            return row, None
        return row, resize_and_crop(image, size, size)

    for row, image in prefetch_map(prepare, files):
        if image is not None:
            yield row, image
