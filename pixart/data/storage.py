"""The files of a dataset by name: on a file system of this machine, or behind a URL with a cache on this machine."""

import errno
import fcntl
import os
import resource
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Event
from typing import Any, BinaryIO, Protocol

import fsspec
import numpy as np

from pixart.config.dataset import is_url

OPEN_FILES = 2048  # a window has blocks of 256 shards, each with a file for every column
THREADS = 32
CACHE_GB = 64.0
LOCKS = 256
S3_CLIENT = {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 2}}
Span = tuple[str, int, int]  # name of a file, first and end byte
Buffers = list[Any]  # arrays of bytes


class Objects(Protocol):
    def read_all(self, names: Sequence[str]) -> list[bytes | None]:
        """Whole small files, None for those that are not there; never from a cache."""

    def readv(self, name: str, start: int, buffers: Buffers) -> int:
        """Fills the buffers from byte `start` on -> how many bytes there were. FileNotFoundError for no such file."""

    def in_memory(self, spans: Sequence[Span]) -> bool:
        """Whether no part of these would have to be waited for."""

    def prefetch(self, spans: Sequence[Span], ended: Event) -> None:
        """Makes parts of files quick to read, until `ended` is set."""

    def forget(self, name: str, start: int, stop: int) -> bool:
        """Drops what a cache has of bytes start to stop - 1 -> whether there is a cache."""


def open_objects(path: str, pieces: Callable[[str], int]) -> Objects:
    """`pieces`: how many bytes of the file of a name are fetched and cached together."""
    return Remote(path, pieces) if is_url(path) else Local(path)


def read_object(path: str, name: str) -> bytes | None:
    """One small file, None where it is not there. Raises ValueError for a server that does not answer."""
    return (RemoteFiles(path) if is_url(path) else Local(path)).read_all([name])[0]


class Local:
    def __init__(self, root: str) -> None:
        self.root = root
        self._open = lru_cache(open_files())(self._open_file)

    def _open_file(self, name: str) -> BinaryIO:
        return open(f"{self.root}/{name}", "rb", buffering=0)  # noqa: PTH123 - closed when nobody reads it

    def read_all(self, names: Sequence[str]) -> list[bytes | None]:
        with ThreadPoolExecutor(THREADS) as threads:
            return list(threads.map(self._read_one, names))

    def _read_one(self, name: str) -> bytes | None:
        try:
            return Path(self.root, name).read_bytes()
        except FileNotFoundError:
            return None

    def readv(self, name: str, start: int, buffers: Buffers) -> int:
        file = self._open(name)
        return os.preadv(file.fileno(), buffers, start)

    def in_memory(self, spans: Sequence[Span]) -> bool:
        try:
            for name, start, _ in spans:
                os.preadv(self._open(name).fileno(), [bytearray(1)], start, os.RWF_NOWAIT)
        except OSError:  # it would, or this file system cannot tell
            return False
        return True

    def prefetch(self, spans: Sequence[Span], ended: Event) -> None:
        for name, start, stop in spans:
            file = self._open(name)
            os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_WILLNEED)

    def forget(self, name: str, start: int, stop: int) -> bool:
        return False


class RemoteFiles:
    """Any file system that fsspec knows. Raises ValueError where the server does not answer as it should."""

    def __init__(self, url: str) -> None:
        self.url = url
        options = {"config_kwargs": S3_CLIENT} if url.startswith(("s3://", "s3a://")) else {}
        with self.clear_errors():
            self.system, root = fsspec.core.url_to_fs(url, **options)
        self.root = root.rstrip("/")

    @contextmanager
    def clear_errors(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:  # each protocol's client has errors of its own
            line = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"dataset {self.url} cannot be read: {line}") from error

    def read_all(self, names: Sequence[str]) -> list[bytes | None]:
        paths = [f"{self.root}/{name}" for name in names]
        with self.clear_errors():
            found = self.system.cat(paths, recursive=False, on_error="return")
            for value in found.values():
                if isinstance(value, Exception) and not isinstance(value, FileNotFoundError):
                    raise value
        return [value if isinstance(value := found[path], bytes) else None for path in paths]

    def names(self, folder: str) -> list[str]:
        """Of what a folder holds. Raises FileNotFoundError where there is none."""
        with self.clear_errors():
            return [path.rpartition("/")[2] for path in self.system.ls(f"{self.root}/{folder}", detail=False)]


class Remote(RemoteFiles):
    """Pieces of files are fetched once and kept in a cache that all processes of this machine share.

    It lies in the folder PIXART_CACHE, best on a disk of the node, and takes at most PIXART_CACHE_GB of it; what came
    first goes first. A dataset that was made anew at the same URL needs an empty cache.
    """

    def __init__(self, url: str, pieces: Callable[[str], int]) -> None:
        super().__init__(url)
        try:
            from diskcache import Cache
        except ImportError:
            raise ValueError(f"dataset {url}: install the package's extra s3 to read it") from None
        self.pieces = pieces
        home = Path(os.environ.get("PIXART_CACHE") or Path.home() / ".cache" / "pixart")
        self.locks = home / "locks"
        try:
            self.locks.mkdir(parents=True, exist_ok=True)
            self.cache = Cache(str(home), size_limit=cache_bytes(), disk_min_file_size=0)
        except OSError as error:
            raise ValueError(f"PIXART_CACHE={home}: {error.strerror or error}") from None
        self._piece = lru_cache(open_files())(self._open_piece)

    def readv(self, name: str, start: int, buffers: Buffers) -> int:
        size, stop = self.pieces(name), start + sum(len(buffer) for buffer in buffers)
        if start // size == (stop - 1) // size:
            file = self._piece(name, start // size)
            return os.preadv(file.fileno(), buffers, start % size)
        data = b""
        for index in self._indices(name, start, stop):
            file, first = self._piece(name, index), max(start - index * size, 0)
            data += os.pread(file.fileno(), min(stop - index * size, size) - first, first)
        rest = memoryview(data)
        for buffer in buffers:
            part, rest = rest[: len(buffer)], rest[len(buffer) :]
            buffer[: len(part)] = np.frombuffer(part, np.uint8)
        return len(data)

    def in_memory(self, spans: Sequence[Span]) -> bool:
        return False  # the cache's own look at what it has costs little beside a fetch

    def prefetch(self, spans: Sequence[Span], ended: Event) -> None:
        pieces = [(name, index) for name, start, stop in spans for index in self._indices(name, start, stop)]
        with ThreadPoolExecutor(THREADS) as threads:
            list(threads.map(lambda piece: self._keep(piece[0], piece[1], ended), dict.fromkeys(pieces)))

    def _keep(self, name: str, index: int, ended: Event) -> None:
        if not ended.is_set() and self._key(name, index) not in self.cache:
            self._fetch(name, index).close()

    def forget(self, name: str, start: int, stop: int) -> bool:
        for index in self._indices(name, start, stop):
            self.cache.delete(self._key(name, index))
        self._piece.cache_clear()
        return True

    def _indices(self, name: str, start: int, stop: int) -> range:
        return range(start // self.pieces(name), (stop - 1) // self.pieces(name) + 1)

    def _key(self, name: str, index: int) -> str:
        return f"{self.url}/{name} {index} x {self.pieces(name)}"

    def _open_piece(self, name: str, index: int) -> BinaryIO:
        return self.cache.get(self._key(name, index), read=True) or self._fetch(name, index)

    def _fetch(self, name: str, index: int) -> BinaryIO:
        """One of the processes and threads that ask at the same time fetches, the others find it."""
        key, size = self._key(name, index), self.pieces(name)
        with locked(self.locks / str(zlib.crc32(key.encode()) % LOCKS)):
            if found := self.cache.get(key, read=True):
                return found
            data = self._cat_range(f"{self.root}/{name}", index * size, (index + 1) * size)
            try:
                self.cache.set(key, data)
            except OSError as error:
                raise ValueError(
                    f"PIXART_CACHE={self.cache.directory}: {error.strerror}; PIXART_CACHE_GB says how much it may take"
                ) from error
            if found := self.cache.get(key, read=True):
                return found
        file: Any = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - the limit is smaller than what is in use
        file.write(data)
        return file

    def _cat_range(self, path: str, start: int, stop: int) -> bytes:
        with self.clear_errors():
            try:
                return self.system.cat_file(path, start=start, end=stop)
            except OSError as error:
                if error.errno == errno.EINVAL:  # the file ends before
                    return b""
                raise


def open_files() -> int:
    """How many files to keep open; the process may have more than by default, as far as the machine lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * OPEN_FILES
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(OPEN_FILES, soft // 2)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cache_bytes() -> int:
    text = os.environ.get("PIXART_CACHE_GB") or str(CACHE_GB)
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0 < limit < float("inf"):
        raise ValueError(f"PIXART_CACHE_GB={text!r}: must be a number of gigabytes above 0")
    return int(limit * 1e9)
