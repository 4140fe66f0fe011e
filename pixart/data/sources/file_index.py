"""File listings by URL on any file system, and row indices of files that contain many items."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pixart.atomic import write_atomically
from pixart.data.sources.local_files import walk_local

IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".jpe",
    ".jfif",
    ".png",
    ".webp",
    ".bmp",
    ".gif",
    ".tif",
    ".tiff",
    ".avif",
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

    def with_suffix(self, suffix: str) -> "FileList":
        """Return only the files with a suffix such as ".tar"."""
        sizes = {name: size for name, size in self.sizes.items() if suffix_of(name) == suffix}
        return FileList(url=self.url, system=self.system, root=self.root, sizes=sizes, left_out=self.left_out)


def list_files(url: str) -> FileList:
    """List the files of a folder, a file or a glob pattern, except hidden files.

    Raises ValueError if there is nothing at the URL or it cannot be read.
    """
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:  # an unknown protocol, or its package is not installed
        raise ValueError(f"source {url!r}: {error}; {ALLOWED}") from None
    try:
        if isinstance(system, LocalFileSystem) and system.isdir(path):
            root = path.rstrip("/")
            local, left_out = walk_local(root)
            if not local and not left_out:
                raise FileNotFoundError(f"does not exist or is empty; {ALLOWED}")
            return FileList(url=url, system=system, root=root, sizes=local, left_out=left_out)
        root, infos = _list(system, path.rstrip("/"))
    except Exception as error:  # every file system has its own exceptions
        raise ValueError(f"source {url!r}: {' '.join(str(error).split())}") from error
    sizes = {
        name: info.get("size") or -1
        for name, info in sorted((name.removeprefix(f"{root}/"), info) for name, info in infos.items())
        if is_file(f"{root}/{name}", info) and not any(part.startswith(".") for part in name.split("/"))
    }
    if not infos:
        raise ValueError(f"source {url!r}: does not exist or is empty; {ALLOWED}")
    return FileList(url=url, system=system, root=root, sizes=sizes)


def _list(system: Any, path: str) -> tuple[str, dict[str, dict]]:
    """Return the folder that names are relative to, and the info of each file by its full name."""
    if system.isdir(path):
        return path, system.find(path, detail=True)
    if system.isfile(path):
        return path.rpartition("/")[0], {path: system.info(path)}
    prefix = path[: min((path.index(wildcard) for wildcard in "*?[" if wildcard in path), default=0)]
    return prefix.rpartition("/")[0], system.glob(path, detail=True) if prefix else {}


def is_file(path: str, info: dict[str, Any]) -> bool:
    """Return whether a path is a file or a link to one, rather than a pipe, which would block, or a broken link."""
    return info["type"] == "file" or (info.get("islink", False) and Path(path).is_file())


def suffix_reason(name: str) -> str:
    """Return the reason for leaving out a file that is no image, which can be shown whatever its name is."""
    suffix = suffix_of(name)[1:]
    if not suffix:
        return "no suffix"
    return f"suffix .{suffix}" if suffix.isascii() and suffix.isalnum() and len(suffix) < 16 else "other suffix"


def suffix_of(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


class RowIndex:
    """Assigns consecutive rows to files that contain many items each.

    `count_rows` opens a file and returns its number of rows; results are kept in `counts_file`, if given.
    Raises ValueError if the files have no rows.
    """

    def __init__(
        self, files: FileList, max_images: int | None, counts_file: Path | None, count_rows: Callable[[str], int]
    ):
        known = json.loads(counts_file.read_text()) if counts_file and counts_file.exists() else {}
        missing = [name for name, size in files.sizes.items() if known.get(name, [None])[0] != size]
        with ThreadPoolExecutor(16) as threads:
            counts = threads.map(count_rows, missing)
            known |= {name: [files.sizes[name], rows] for name, rows in zip(missing, counts, strict=True)}
        if counts_file and missing:
            write_atomically(counts_file, json.dumps({name: known[name] for name in files.sizes}))
        self._names = list(files.sizes)
        self._counts = {name: known[name][1] for name in self._names}
        self._ends = [0, *accumulate(self._counts.values())]
        self._rows = min(self._ends[-1], max_images or self._ends[-1])
        if not self._rows:
            raise ValueError(f"source {files.url!r}: its files contain no images; {ALLOWED}")

    def __len__(self) -> int:
        return self._rows

    def count(self, name: str) -> int:
        """Return the number of rows of a file."""
        return self._counts[name]

    def spans(self, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """Yield the files that contain rows start to stop - 1, each with the range of its rows to read."""
        stop = min(stop, self._rows)
        for name, (first, end) in zip(self._names, pairwise(self._ends), strict=True):
            if max(start, first) < min(stop, end):
                yield name, max(start, first) - first, min(stop, end) - first
