"""The store of training data: written one shard at a time, read at random rows.

The array `valid` is written last and its fill value is 0, so rows of an unfinished shard are never read. Rows are read
by vectored system calls directly into a batch, several times faster than with a Zarr library.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property, reduce
from pathlib import Path
from threading import Event

import google_crc32c
import numpy as np

from pixart.data.manifest import Manifest
from pixart.data.storage import Span, open_storage
from pixart.data.store.layout import (
    BUCKET,
    CRC_BYTES,
    LATENTS,
    MAX_BUFFERS,
    SUMS,
    VALID,
    ZARR_FOLDER,
    Column,
    columns_of,
    crc32c,
    create,
    latents_of,
    layout,
    write_shard_file,
)

__all__ = ["Store", "create", "layout", "write_shard"]

StoredRows = Callable[[int, int], np.ndarray]  # of a bucket and a shard: the rows of the file that have a chunk
NUM_READERS = 2  # threads
MAX_WRITERS = 8  # threads that write the files of a shard
NUM_PROBES = 16  # blocks of a window that are tested for being cached
MAX_GAP_BYTES = 16384  # between small chunks that one system call reads; reading them takes less time than a call
MAX_COPIED_CHUNK = 4096  # bytes; smaller chunks are read contiguously and copied, larger ones scattered by the read


def write_shard(manifest: Manifest, shard: int, columns: dict[str, np.ndarray]) -> None:
    """Write all rows of one shard, replacing those of an earlier attempt.

    `columns` has the names and row shapes of `layout`; the latents of an aspect bucket are those of its valid rows. The
    file of `valid` is deleted first and written last. Raises ValueError if a column is missing or has another shape.
    """
    root, layouts, valid = Path(manifest.data.path), columns_of(manifest), columns[VALID]
    if columns.keys() != layout(manifest).keys():
        raise ValueError(f"shard {shard} has columns {sorted(columns)}; it must have {sorted(layout(manifest))}")
    (root / layouts[VALID].file(shard)).unlink(missing_ok=True)
    stored = {
        name: None if column.bucket is None else np.flatnonzero(valid & (columns[BUCKET] == column.bucket))
        for name, column in layouts.items()
    }
    for name, values in columns.items():
        rows = stored[name]
        expected = (len(valid) if rows is None else len(rows), *layouts[name].shape)
        if values.shape != expected:
            raise ValueError(f"shard {shard}: {name} has shape {values.shape}; it must have shape {expected}")
    with ThreadPoolExecutor(min(MAX_WRITERS, len(columns))) as threads:
        sums = [
            threads.submit(
                channel_sums, columns[name], valid if stored[name] is None else np.ones(len(columns[name]), bool)
            )
            for name in latents_of(manifest)
        ]
        names = [name for name in columns if name != VALID]
        list(threads.map(lambda name: write_shard_file(root, layouts[name], shard, columns[name], stored[name]), names))
        write_shard_file(root, layouts[SUMS], shard, np.sum([part.result() for part in sums], axis=0))
    write_shard_file(root, layouts[VALID], shard, valid)


def channel_sums(latents: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Return the moments of the valid latents (B, C, h, w) as float64 (1 + 2 C,).

    These are the number of values per channel, the C sums and the C sums of squares.
    """
    rows, channels = latents.shape[:2]
    pixels = math.prod(latents.shape[2:])
    sums = np.zeros((2, channels))
    for start in range(0, rows, 16):
        chunk = latents[start : start + 16][valid[start : start + 16]].reshape(-1, channels, pixels)
        chunk = chunk.astype(np.float32)
        sums += chunk.sum((0, 2)), np.einsum("bcx,bcx->c", chunk, chunk)
    return np.concatenate([[valid.sum() * pixels], *sums])


class Store:
    """Random access to the rows of a dataset. `arrays` are the row shapes and dtypes of its columns.

    In a dataset with aspect buckets, rows whose `latents` are read together must be of one bucket.

    Raises ValueError if the dataset has no arrays.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest, self.arrays, self.columns = manifest, layout(manifest), columns_of(manifest)
        self.storage = open_storage(manifest.data.path, lambda name: self.columns[name.split("/")[1]].segment_size)
        if self.storage.read_files([f"{ZARR_FOLDER}/zarr.json"]) == [None]:
            raise ValueError(f"dataset {manifest.data.path} has no latents; run 'latents' first")
        self._readers = ThreadPoolExecutor(NUM_READERS)
        self._checked: set[tuple[str, int]] = set()  # column and shard of files with a verified index

    def valid_rows(self) -> np.ndarray:
        """Return the indices of the valid rows, ascending, int64 (num_valid,)."""
        return np.flatnonzero(self._read_all(VALID))

    def bucket_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the index of the aspect bucket of each row, int16 (len(rows),); zeros in a dataset without buckets."""
        return self.chunks.bucket[rows] if self.manifest.buckets else np.zeros(len(rows), np.int16)

    def latents_column(self, rows: np.ndarray) -> str:
        """Return the name of the array that has the latents of rows. Raises ValueError for rows of several buckets."""
        if not self.manifest.buckets:
            return LATENTS
        buckets = np.unique(self.bucket_of(rows))
        if len(buckets) != 1:
            raise ValueError(f"latents of {len(buckets)} aspect buckets cannot be read together; read one bucket")
        return list(latents_of(self.manifest))[buckets[0]]

    @cached_property
    def chunks(self) -> "BucketChunks":
        """Where the latents of each row are stored, in a dataset with aspect buckets."""
        return BucketChunks(self._read_all(BUCKET), self._read_all(VALID), self.manifest.rows_per_shard)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the mean and standard deviation of the valid latents of each channel.

        With the normalization `scalar`, all channels have the same values. Raises ValueError without a valid row.
        """
        totals = self._read_all(SUMS).sum(0)
        if totals[0] == 0:
            raise ValueError(f"dataset {self.manifest.data.path} has no valid rows; run 'latents' first")
        mean, square = totals[1:].reshape(2, -1) / totals[0]
        if self.manifest.data.normalization == "scalar":
            mean, square = np.full_like(mean, mean.mean()), np.full_like(square, square.mean())
        return tuple(mean.tolist()), tuple(np.sqrt(square - mean**2).tolist())

    def read(self, name: str, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Read rows of a column in the given order, (len(rows), ...), into `out` if it is given.

        Raises ValueError if a file is missing, truncated or altered.
        """
        column = self.columns[self.latents_column(rows) if name == LATENTS else name]
        if out is None:
            out = np.empty((len(rows), *column.shape), column.dtype)
        if column.chunk > 1:
            shards, inverse = np.unique(rows // column.rows, return_inverse=True)
            values = np.empty((len(shards), column.rows), column.dtype)
            self._read_chunks(column, shards, values.view(np.uint8), np.arange(len(shards)), None)
            out[...] = values[inverse, rows % column.rows]
            return out
        chunks = rows
        if column.bucket is not None:
            chunks = self.chunks.chunk_of[rows]
            if (chunks < 0).any():
                raise ValueError(
                    f"dataset {self.manifest.data.path}: row {rows[chunks < 0][0]} is not valid, and has no latents"
                )
        self._read_rows(column, chunks, out, self.chunks.stored if column.bucket is not None else None)
        return out

    def read_shard(self, shard: int) -> dict[str, np.ndarray]:
        """Read all columns of one shard, as `write_shard` takes them.

        Raises ValueError if a file is missing, truncated or altered.
        """
        rows, per_shard = np.arange(*self.manifest.shard_range(shard)), self.manifest.rows_per_shard
        columns = {name: self.read(name, rows) for name in self.arrays if self.columns[name].bucket is None}
        for name in self.arrays:
            column = self.columns[name]
            if column.bucket is not None:
                stored = np.flatnonzero(columns[VALID] & (columns[BUCKET] == column.bucket))
                columns[name] = np.empty((len(stored), *column.shape), column.dtype)
                chunks = shard * per_shard + np.arange(len(stored))
                self._read_rows(column, chunks, columns[name], lambda *_, stored=stored: stored)
        return columns

    def _read_rows(self, column: Column, chunks: np.ndarray, out: np.ndarray, stored: "StoredRows | None") -> None:
        """Read chunks of one row each into `out` (len(chunks), ...)."""
        target = out.reshape(-1).view(np.uint8).reshape(len(chunks), column.row_bytes)
        parts = np.array_split(
            np.argsort(chunks, kind="stable"), NUM_READERS if column.stride > MAX_COPIED_CHUNK else 1
        )
        list(self._readers.map(lambda part: self._read_chunks(column, chunks[part], target, part, stored), parts))

    def prefetch(self, names: Iterable[str], rows: np.ndarray, cancelled: Event) -> None:
        """Load the blocks that contain these rows into a cache, until `cancelled` is set.

        Does nothing if a sample of the blocks is cached already.
        """
        columns = [self.columns[name] for name in names]
        if not self.storage.is_cached(self._blocks(columns, rows[:: -(-len(rows) // NUM_PROBES)])):
            self.storage.prefetch(self._blocks(columns, rows), cancelled)

    def _blocks(self, columns: Iterable[Column], rows: np.ndarray) -> list[Span]:
        per_shard = self.manifest.rows_per_shard
        spans: list[Span] = []
        for column in columns:
            chunks = rows if column.bucket is None else self.chunks.chunk_of[rows]
            for shard, chunk in zip(*(part.tolist() for part in divmod(chunks, per_shard)), strict=True):
                count = column.rows if column.bucket is None else self.chunks.count(column.bucket, shard)
                spans.append((column.file(shard), *column.span(chunk, count)))
        return list(dict.fromkeys(spans))

    def _read_chunks(
        self,
        column: Column,
        chunks: np.ndarray,
        target: np.ndarray,
        target_rows: np.ndarray,
        stored: "StoredRows | None",
    ) -> None:
        """Read ascending chunks of a column to the rows `target_rows` of the target (B, bytes).

        Consecutive chunks are read by one system call, and of small ones also those between them. `stored` is for a
        column of an aspect bucket.
        """
        scattered, per_shard = column.stride > MAX_COPIED_CHUNK, column.rows // column.chunk
        gap = 1 if scattered else max(1, MAX_GAP_BYTES // column.stride)
        checksums = np.empty((len(chunks) if scattered else 0, CRC_BYTES), np.uint8)
        for start, stop in contiguous_runs(chunks, per_shard, gap):
            shard, first = divmod(int(chunks[start]), per_shard)
            if (column.name, shard) not in self._checked:
                rows = None if stored is None or column.bucket is None else stored(column.bucket, shard)
                self._check_index(column, shard, rows)
            if scattered:
                pairs = zip(target_rows[start:stop].tolist(), checksums[start:stop], strict=True)
                buffers = [buffer for row, crc in pairs for buffer in (target[row], crc)]
                self._read(column, shard, first * column.stride, buffers, stop - start)
            else:
                places = chunks[start:stop] - chunks[start]
                block = np.empty((int(places[-1]) + 1, column.stride), np.uint8)
                self._read(column, shard, first * column.stride, [block.reshape(-1)], len(block))
                target[target_rows[start:stop]] = block[places, :-CRC_BYTES]

    def _check_index(self, column: Column, shard: int, stored: np.ndarray | None) -> None:
        """Check that the chunks of a file are where this module writes them, and not where another library did."""
        expected = np.frombuffer(column.index(stored), np.uint8)
        if len(expected):
            actual = np.empty_like(expected)
            self._read(column, shard, (column.rows if stored is None else len(stored)) * column.stride, [actual], 1)
            if not np.array_equal(actual, expected):
                raise self._damaged(column, shard, "was written by another library")
        self._checked.add((column.name, shard))

    def _read(self, column: Column, shard: int, start: int, buffers: list[np.ndarray], chunks: int) -> None:
        """Fill the buffers with chunks of equal size and verify their checksums; refetch a corrupted cache once."""
        name = column.file(shard)
        stop = start + sum(map(len, buffers))
        for is_retry in (False, True):
            try:
                complete = self.storage.readv(name, start, buffers) == stop - start
                crc = reduce(google_crc32c.extend, buffers, 0)
                if complete and crc == expected_crc(chunks, (stop - start) // chunks):
                    return
                fault = "is corrupted: a CRC-32C does not match" if complete else "is truncated"
            except OSError as error:
                fault = f"cannot be read: {error.strerror or error}"
            if is_retry or not self.storage.invalidate(name, start, stop):
                raise self._damaged(column, shard, fault)

    def _damaged(self, column: Column, shard: int, fault: str) -> ValueError:
        path = self.manifest.data.path
        return ValueError(f"dataset {path}: array {column.name}, shard {shard}: {column.file(shard)} {fault}")

    def _read_all(self, name: str) -> np.ndarray:
        """Read all rows of a small array; rows of unwritten shards are zeros."""
        column, shards = self.columns[name], range(self.manifest.data.num_shards)
        values = np.zeros((len(shards), column.rows * column.row_bytes), np.uint8)
        for shard, data in zip(shards, self.storage.read_files([column.file(shard) for shard in shards]), strict=True):
            if data is not None:
                if len(data) != values.shape[1] + CRC_BYTES or data[-CRC_BYTES:] != crc32c(data[:-CRC_BYTES]):
                    raise self._damaged(column, shard, "is corrupted: its CRC-32C or size does not match")
                values[shard] = np.frombuffer(data[:-CRC_BYTES], np.uint8)
        return values.view(column.dtype).reshape(-1, *column.shape)


class BucketChunks:
    """Where the latents of the rows of a dataset with aspect buckets are stored.

    `bucket` and `valid` are the columns of all rows. A chunk is numbered by shard * rows_per_shard plus its place in
    the file of its bucket; `chunk_of` is that number by row, int64, and -1 for a row without latents.
    """

    def __init__(self, bucket: np.ndarray, valid: np.ndarray, rows_per_shard: int) -> None:
        self.bucket, self.rows_per_shard = bucket, rows_per_shard
        self.chunk_of = np.full(len(bucket), -1, np.int64)
        rows = np.flatnonzero(valid)
        rows = rows[np.argsort(bucket[rows], kind="stable")]  # by bucket, and in each ascending
        shard = rows // rows_per_shard
        begins = np.flatnonzero(np.diff(bucket[rows], prepend=-1) | np.diff(shard, prepend=-1))
        lengths = np.diff(begins, append=len(rows))
        self.chunk_of[rows] = np.arange(len(rows)) - np.repeat(begins, lengths) + shard * rows_per_shard
        self._stored = {
            (int(bucket[rows[begin]]), int(shard[begin])): rows[begin : begin + length] % rows_per_shard
            for begin, length in zip(begins.tolist(), lengths.tolist(), strict=True)
        }

    def stored(self, bucket: int, shard: int) -> np.ndarray:
        """Return the rows of a shard, counted within it, that the file of a bucket has chunks of, ascending."""
        return self._stored.get((bucket, shard), np.arange(0))

    def count(self, bucket: int, shard: int) -> int:
        """Return the number of chunks in a bucket's file of a shard."""
        return len(self.stored(bucket, shard))


@cache
def expected_crc(chunks: int, stride: int) -> int:
    """Return the CRC-32C over `chunks` valid chunks of `stride` bytes that each end with their own CRC-32C.

    As a CRC is linear, this value does not depend on the data, so one computation verifies consecutive chunks.
    """
    zeros = np.zeros(stride - CRC_BYTES, np.uint8).tobytes()
    return google_crc32c.value((zeros + crc32c(zeros)) * chunks)


def contiguous_runs(rows: np.ndarray, rows_per_shard: int, gap: int = 1) -> Iterator[tuple[int, int]]:
    """Yield the start and end of runs of ascending rows of one shard, each short enough for one system call.

    Rows of a run that follow each other are at most `gap` apart; without gaps they are consecutive, and not equal.
    """
    steps = np.diff(rows)
    breaks = (steps != 1 if gap == 1 else steps > gap) | (np.diff(rows // rows_per_shard) != 0)
    ends = [*(np.flatnonzero(breaks) + 1).tolist(), len(rows)]
    start = 0
    for end in ends:
        while start < end:
            stop = min(end, start + MAX_BUFFERS // 2)
            if gap > 1:
                stop = int(np.searchsorted(rows[start:stop], rows[start] + MAX_BUFFERS // 2)) + start
            yield start, stop
            start = stop
