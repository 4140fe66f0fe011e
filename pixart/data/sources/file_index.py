"""Files by URL on any file system, and the rows of files that hold many each."""

import json
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
ALLOWED = (
    "a source is `demo`, or the path or fsspec URL of an image folder (.jpg, .jpeg, .png, .webp), "
    "of .parquet files or of uncompressed .tar files"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """Files of one file system, by their sorted names relative to `root`."""

    url: str
    system: Any  # fsspec.AbstractFileSystem
    root: str
    sizes: dict[str, int]  # bytes, -1 where the file system does not know

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def of(self, suffix: str) -> "Files":
        sizes = {name: size for name, size in self.sizes.items() if suffix_of(name) == suffix}
        return Files(url=self.url, system=self.system, root=self.root, sizes=sizes)


def find_files(url: str) -> Files:
    """Lists what `url` names, without hidden files. Raises ValueError where it names nothing."""
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:  # an unknown protocol, or one whose package is not installed
        raise ValueError(f"source {url!r}: {error}; {ALLOWED}") from None
    try:
        root, found = _listed(system, path.rstrip("/"))
    except Exception as error:  # each file system has errors of its own for what it cannot reach
        raise ValueError(f"source {url!r}: {' '.join(str(error).split())}") from error
    sizes = {
        name: info.get("size") or -1
        for name, info in sorted((name.removeprefix(f"{root}/"), info) for name, info in found.items())
        if is_file(f"{root}/{name}", info) and not any(part.startswith(".") for part in name.split("/"))
    }
    if not found:
        raise ValueError(f"source {url!r}: does not exist or is empty; {ALLOWED}")
    return Files(url=url, system=system, root=root, sizes=sizes)


def _listed(system: Any, path: str) -> tuple[str, dict[str, dict]]:
    """The folder that names are relative to, and what is known of each file by its full name."""
    if system.isdir(path):
        return path, dict(_below(system, path))
    if system.isfile(path):
        return path.rpartition("/")[0], {path: system.info(path)}
    fixed = path[: min((path.index(sign) for sign in "*?[" if sign in path), default=0)]
    return fixed.rpartition("/")[0], system.glob(path, detail=True) if fixed else {}


def _below(system: Any, path: str) -> Iterator[tuple[str, dict]]:
    """The files below `path`. fsspec's own listing takes a link to a directory for a file."""
    for name, info in system.find(path, detail=True).items():
        if info.get("islink") and system.isdir(name):
            yield from _below(system, name)
        else:
            yield name, info


def is_file(path: str, info: dict[str, Any]) -> bool:
    """Or a link to one: no pipe, which would be read for ever, and no link that leads nowhere."""
    return info["type"] == "file" or (info.get("islink", False) and Path(path).is_file())


def suffix_of(name: str) -> str:
    return PurePosixPath(name).suffix.lower()


class RowsOfFiles:
    """Rows of files that hold many each; `count` says how many, looking into the file."""

    def __init__(self, files: Files, images: int | None, counts: Path | None, count: Callable[[str], int]):
        known = json.loads(counts.read_text()) if counts and counts.exists() else {}
        missing = [name for name, size in files.sizes.items() if known.get(name, [None])[0] != size]
        with ThreadPoolExecutor(16) as threads:
            known |= {
                name: [files.sizes[name], rows] for name, rows in zip(missing, threads.map(count, missing), strict=True)
            }
        if counts and missing:
            counts.parent.mkdir(parents=True, exist_ok=True)
            temporary = counts.with_name(f".{counts.name}.{uuid.uuid4().hex[:8]}")
            temporary.write_text(json.dumps({name: known[name] for name in files.sizes}))
            temporary.replace(counts)
        self._names = list(files.sizes)
        self._ends = [0, *accumulate(known[name][1] for name in self._names)]
        self._rows = min(self._ends[-1], images or self._ends[-1])
        if not self._rows:
            raise ValueError(f"source {files.url!r}: its files have no images; {ALLOWED}")

    def __len__(self) -> int:
        return self._rows

    def spans(self, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """The files that hold rows start to stop - 1, each with the first and the end row to read of it."""
        stop = min(stop, self._rows)
        for name, (first, end) in zip(self._names, pairwise(self._ends), strict=True):
            if max(start, first) < min(stop, end):
                yield name, max(start, first) - first, min(stop, end) - first
