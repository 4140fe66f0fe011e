"""Walking through the files at a URL of any file system, one after the other, so that memory does not grow."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import get_loop
from fsspec.implementations.local import LocalFileSystem

from pixart.data.listing.file_list import ALLOWED
from pixart.data.listing.local_files import walk_local

ENTRIES = 4096  # of a bucket that are requested together
File = tuple[str, int]  # name relative to the root, and bytes, or -1 if the file system does not report them


@dataclass(kw_only=True, slots=True)
class Place:
    """A folder, a file or a pattern of files."""

    url: str
    system: Any  # fsspec.AbstractFileSystem
    root: str  # the folder that names are relative to
    pattern: str = ""  # the path of a single file or of a glob pattern, "" for a folder
    left_out: Counter[str] = field(default_factory=Counter)  # files that `files` has not yielded, by reason

    def files(self) -> Iterator[File]:
        """Yield the name and the size of each file in any order, except hidden files.

        Raises ValueError if it cannot be read.
        """
        try:
            if self.pattern:
                yield from self._matching()
            elif isinstance(self.system, LocalFileSystem):
                yield from walk_local(self.root, self.left_out)
            else:
                yield from _visible(_walk(self.system, self.root))
        except Exception as error:  # every file system has its own exceptions
            raise ValueError(f"source {self.url!r}: {' '.join(str(error).split())}") from error

    def _matching(self) -> Iterator[File]:
        if self.system.isfile(self.pattern):
            infos = {self.pattern: self.system.info(self.pattern)}
        else:
            infos = self.system.glob(self.pattern, detail=True) if self.root else {}
        for path, info in infos.items():
            if is_file(path, info):
                yield from _visible([(path.removeprefix(f"{self.root}/"), _size(info))])


def find_place(url: str) -> Place:
    """Return the place that a URL means. Raises ValueError if its protocol is unknown or it cannot be read."""
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:  # an unknown protocol, or its package is not installed
        raise ValueError(f"source {url!r}: {error}; {ALLOWED}") from None
    path = path.rstrip("/")
    try:
        if system.isdir(path):
            return Place(url=url, system=system, root=path)
    except Exception as error:  # every file system has its own exceptions
        raise ValueError(f"source {url!r}: {' '.join(str(error).split())}") from error
    before = path[: min((path.index(wildcard) for wildcard in "*?[" if wildcard in path), default=len(path))]
    return Place(url=url, system=system, root=before.rpartition("/")[0], pattern=path)


def is_file(path: str, info: dict[str, Any]) -> bool:
    """Return whether a path is a file or a link to one, rather than a pipe, which would block, or a broken link."""
    return info["type"] == "file" or (info.get("islink", False) and Path(path).is_file())


def _size(info: dict[str, Any]) -> int:
    return -1 if info.get("size") is None else info["size"]


def _visible(files: Any) -> Iterator[File]:
    return ((name, size) for name, size in files if not any(part.startswith(".") for part in name.split("/")))


def _walk(system: Any, root: str) -> Iterator[File]:
    """Yield the files of a folder that is not on a local disk."""
    if hasattr(system, "_iterdir"):
        yield from _walk_bucket(system, root)
        return
    folders = [root]
    while folders:
        folder = folders.pop()
        for info in system.ls(folder, detail=True):
            path = info["name"].rstrip("/")
            if info["type"] == "directory" and path != folder:
                folders.append(path)
            elif info["type"] == "file" and path != folder:
                yield path.removeprefix(f"{root}/"), _size(info)
        system.invalidate_cache(folder)  # or it would keep every listing in memory


def _walk_bucket(system: Any, root: str) -> Iterator[File]:
    """Yield the files of a bucket of S3 by pages; `ls` would hold a whole folder in memory."""
    bucket, _, prefix = root.partition("/")
    objects = system._iterdir(bucket, delimiter="", prefix=f"{prefix}/" if prefix else "")

    async def page() -> list[dict[str, Any]]:
        infos = []
        async for info in objects:
            infos.append(info)
            if len(infos) == ENTRIES:
                break
        return infos

    while infos := asyncio.run_coroutine_threadsafe(page(), get_loop()).result():
        for info in infos:
            path = info["name"]
            if not path.endswith("/"):  # an empty object that stands for a folder
                yield path.removeprefix(f"{root}/"), _size(info)
