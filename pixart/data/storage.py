"""Access to a dataset's files by name: on a local file system, or behind a URL with a node-local cache."""

import errno
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

from pixart.atomic import file_lock
from pixart.config.dataset import is_url

MAX_OPEN_FILES = 2048  # a shuffle window has blocks of 256 shards, each with one file per column
NUM_THREADS = 32
DEFAULT_CACHE_GB = 64.0
NUM_LOCKS = 256
S3_CLIENT = {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 2}}
Span = tuple[str, int, int]  # name of a file, its first byte and the byte after the last
Buffers = list[Any]  # writable byte arrays


class Storage(Protocol):
    """Read access to the files of one dataset."""

    def read_files(self, names: Sequence[str]) -> list[bytes | None]:
        """Return the contents of small files, None for those that do not exist. Never served from a cache."""

    def readv(self, name: str, start: int, buffers: Buffers) -> int:
        """Fill the buffers from byte `start` on and return the number of bytes read.

        Raises FileNotFoundError if the file does not exist.
        """

    def is_cached(self, spans: Sequence[Span]) -> bool:
        """Return whether reading these spans would not block on a disk or a network."""

    def prefetch(self, spans: Sequence[Span], cancelled: Event) -> None:
        """Load spans into a cache, until `cancelled` is set."""

    def invalidate(self, name: str, start: int, stop: int) -> bool:
        """Drop the bytes from start to stop - 1 from the cache; return False if there is no cache."""


def open_storage(path: str, segment_size: Callable[[str], int]) -> Storage:
    """Open a dataset's directory or URL.

    `segment_size` returns, for the name of a file, the number of bytes that are fetched and cached together.
    """
    return CachedRemoteStorage(path, segment_size) if is_url(path) else LocalStorage(path)


def read_file(path: str, name: str) -> bytes | None:
    """Return the content of one small file of a dataset, None if it does not exist.

    Raises ValueError if the server does not respond.
    """
    return (RemoteFiles(path) if is_url(path) else LocalStorage(path)).read_files([name])[0]


class LocalStorage:
    """A dataset on a file system of this machine."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._open = lru_cache(max_open_files())(self._open_file)

    def _open_file(self, name: str) -> BinaryIO:
        return open(f"{self.root}/{name}", "rb", buffering=0)  # noqa: PTH123 - closed when it leaves the LRU cache

    def read_files(self, names: Sequence[str]) -> list[bytes | None]:
        with ThreadPoolExecutor(NUM_THREADS) as threads:
            return list(threads.map(self._read_file, names))

    def _read_file(self, name: str) -> bytes | None:
        try:
            return Path(self.root, name).read_bytes()
        except FileNotFoundError:
            return None

    def readv(self, name: str, start: int, buffers: Buffers) -> int:
        file = self._open(name)
        return os.preadv(file.fileno(), buffers, start)

    def is_cached(self, spans: Sequence[Span]) -> bool:
        try:
            for name, start, _ in spans:
                os.preadv(self._open(name).fileno(), [bytearray(1)], start, os.RWF_NOWAIT)
        except OSError:  # not in the page cache, or the file system does not support RWF_NOWAIT
            return False
        return True

    def prefetch(self, spans: Sequence[Span], cancelled: Event) -> None:
        for name, start, stop in spans:
            file = self._open(name)
            os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_WILLNEED)

    def invalidate(self, name: str, start: int, stop: int) -> bool:
        return False


class RemoteFiles:
    """Uncached files of any file system that fsspec supports. Raises ValueError if the server fails to respond."""

    def __init__(self, url: str) -> None:
        self.url = url
        options = {"config_kwargs": S3_CLIENT} if url.startswith(("s3://", "s3a://")) else {}
        with self.one_line_errors():
            self.system, root = fsspec.core.url_to_fs(url, **options)
        self.root = root.rstrip("/")

    @contextmanager
    def one_line_errors(self) -> Iterator[None]:
        """Turn every exception but FileNotFoundError into a ValueError of one line."""
        try:
            yield
        except FileNotFoundError:
            raise
        except Exception as error:  # the client of each protocol has its own exceptions
            line = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"dataset {self.url} cannot be read: {line}") from error

    def read_files(self, names: Sequence[str]) -> list[bytes | None]:
        paths = [f"{self.root}/{name}" for name in names]
        with self.one_line_errors():
            contents = self.system.cat(paths, recursive=False, on_error="return")
            for value in contents.values():
                if isinstance(value, Exception) and not isinstance(value, FileNotFoundError):
                    raise value
        return [value if isinstance(value := contents[path], bytes) else None for path in paths]

    def list_folder(self, folder: str) -> list[str]:
        """Return the names in a folder. Raises FileNotFoundError if it does not exist."""
        with self.one_line_errors():
            return [path.rpartition("/")[2] for path in self.system.ls(f"{self.root}/{folder}", detail=False)]


class CachedRemoteStorage(RemoteFiles):
    """Remote files whose segments are fetched once into a cache that all processes of this machine share.

    The cache is the folder PIXART_CACHE, best on a local disk of the node. It is limited to PIXART_CACHE_GB and evicts
    the oldest segments first. A dataset that is created again at the same URL needs an empty cache.
    """

    def __init__(self, url: str, segment_size: Callable[[str], int]) -> None:
        super().__init__(url)
        try:
            from diskcache import Cache
        except ImportError:
            raise ValueError(f"dataset {url}: reading a URL needs the package's extra 's3'; install it") from None
        self.segment_size = segment_size
        home = Path(os.environ.get("PIXART_CACHE") or Path.home() / ".cache" / "pixart")
        self.locks = home / "locks"
        try:
            self.locks.mkdir(parents=True, exist_ok=True)
            self.cache = Cache(str(home), size_limit=cache_size_limit(), disk_min_file_size=0)
        except OSError as error:
            raise ValueError(f"PIXART_CACHE={home}: {error.strerror or error}") from None
        self._segment = lru_cache(max_open_files())(self._open_segment)

    def readv(self, name: str, start: int, buffers: Buffers) -> int:
        size, stop = self.segment_size(name), start + sum(len(buffer) for buffer in buffers)
        if start // size == (stop - 1) // size:
            file = self._segment(name, start // size)
            return os.preadv(file.fileno(), buffers, start % size)
        data = b""
        for index in self._indices(name, start, stop):
            file, first = self._segment(name, index), max(start - index * size, 0)
            data += os.pread(file.fileno(), min(stop - index * size, size) - first, first)
        rest = memoryview(data)
        for buffer in buffers:
            part, rest = rest[: len(buffer)], rest[len(buffer) :]
            buffer[: len(part)] = np.frombuffer(part, np.uint8)
        return len(data)

    def is_cached(self, spans: Sequence[Span]) -> bool:
        return False  # `prefetch` looks every segment up anyway, which is cheap compared with a fetch

    def prefetch(self, spans: Sequence[Span], cancelled: Event) -> None:
        segments = [(name, index) for name, start, stop in spans for index in self._indices(name, start, stop)]
        with ThreadPoolExecutor(NUM_THREADS) as threads:
            list(
                threads.map(
                    lambda segment: self._ensure_cached(segment[0], segment[1], cancelled), dict.fromkeys(segments)
                )
            )

    def _ensure_cached(self, name: str, index: int, cancelled: Event) -> None:
        if not cancelled.is_set() and self._key(name, index) not in self.cache:
            self._fetch(name, index).close()

    def invalidate(self, name: str, start: int, stop: int) -> bool:
        for index in self._indices(name, start, stop):
            self.cache.delete(self._key(name, index))
        self._segment.cache_clear()
        return True

    def _indices(self, name: str, start: int, stop: int) -> range:
        return range(start // self.segment_size(name), (stop - 1) // self.segment_size(name) + 1)

    def _key(self, name: str, index: int) -> str:
        return f"{self.url}/{name} {index} x {self.segment_size(name)}"

    def _open_segment(self, name: str, index: int) -> BinaryIO:
        return self.cache.get(self._key(name, index), read=True) or self._fetch(name, index)

    def _fetch(self, name: str, index: int) -> BinaryIO:
        """Fetch one segment into the cache; of concurrent processes and threads, only one transfers it."""
        key, size = self._key(name, index), self.segment_size(name)
        with file_lock(self.locks / str(zlib.crc32(key.encode()) % NUM_LOCKS)):
            if cached := self.cache.get(key, read=True):
                return cached
            data = self._cat_range(f"{self.root}/{name}", index * size, (index + 1) * size)
            try:
                self.cache.set(key, data)
            except OSError as error:
                raise ValueError(
                    f"PIXART_CACHE={self.cache.directory}: {error.strerror}; PIXART_CACHE_GB limits the cache's size"
                ) from error
            if cached := self.cache.get(key, read=True):
                return cached
        file: Any = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - evicted at once: the limit is too small
        file.write(data)
        return file

    def _cat_range(self, path: str, start: int, stop: int) -> bytes:
        with self.one_line_errors():
            try:
                return self.system.cat_file(path, start=start, end=stop)
            except OSError as error:
                if error.errno == errno.EINVAL:  # the range starts after the end of the file
                    return b""
                raise


def max_open_files() -> int:
    """Raise the process's limit of open files as far as needed and allowed; return how many files to keep open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_OPEN_FILES
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return min(MAX_OPEN_FILES, soft // 2)


def cache_size_limit() -> int:
    """Return PIXART_CACHE_GB in bytes. Raises ValueError if it is not a positive number."""
    text = os.environ.get("PIXART_CACHE_GB") or str(DEFAULT_CACHE_GB)
    try:
        limit = float(text)
    except ValueError:
        limit = 0.0
    if not 0 < limit < float("inf"):
        raise ValueError(f"PIXART_CACHE_GB={text!r}: must be a number of gigabytes above 0")
    return int(limit * 1e9)
