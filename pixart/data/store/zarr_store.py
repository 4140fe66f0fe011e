"""The training set: written a whole shard at a time by one writer, read at random rows.

`valid` is written last and fills with 0, so that rows of an unfinished shard are never read. Rows are read by plain
system calls straight into their place in a batch, several times faster than by a library for Zarr.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, reduce
from pathlib import Path
from threading import Event

import google_crc32c
import numpy as np

from pixart.data.manifest import Manifest
from pixart.data.storage import Span, open_objects
from pixart.data.store.layout import (
    BUFFERS,
    CHECKSUM,
    FILE,
    SUMS,
    VALID,
    Column,
    checksum,
    columns_of,
    create,
    layout,
    write_file,
)

__all__ = ["Store", "create", "layout", "write_shard"]

READERS = 2  # threads
SAMPLE = 16  # blocks of a window
SMALL = 4096  # bytes of a chunk that is read with its neighbours and then copied to its place


def write_shard(manifest: Manifest, shard: int, columns: dict[str, np.ndarray]) -> None:
    """Writes every row of one shard, in place of what an earlier attempt left; `columns` by the names of `layout`.

    The shard is marked invalid first and valid last. Raises ValueError for missing columns or other shapes.
    """
    root, made, valid = Path(manifest.data.path), columns_of(manifest), columns[VALID]
    if columns.keys() != layout(manifest).keys():
        raise ValueError(f"shard {shard} has columns {sorted(columns)}, not {sorted(layout(manifest))}")
    (root / made[VALID].file(shard)).unlink(missing_ok=True)
    for name, values in columns.items():
        if values.shape != (len(valid), *made[name].shape):
            raise ValueError(f"shard {shard}: {name} has shape {values.shape}, not {(len(valid), *made[name].shape)}")
    with ThreadPoolExecutor(len(columns)) as threads:
        sums = threads.submit(channel_sums, columns["latents"], valid)
        names = [name for name in columns if name != VALID]
        list(threads.map(lambda name: write_file(root, made[name], shard, columns[name]), names))
        write_file(root, made[SUMS], shard, sums.result())
    write_file(root, made[VALID], shard, valid)


def channel_sums(latents: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """-> float64 (1 + 2 C,): values of a channel, their sum and sum of squares, of the valid latents (B, C, h, w)."""
    rows, channels = latents.shape[:2]
    sums = np.zeros((2, channels))
    for start in range(0, rows, 16):
        some = latents[start : start + 16][valid[start : start + 16]].reshape(-1, channels, latents[0, 0].size)
        some = some.astype(np.float32)
        sums += some.sum((0, 2)), np.einsum("bcx,bcx->c", some, some)
    return np.concatenate([[valid.sum() * latents[0, 0].size], *sums])


class Store:
    """Random access to the rows of a finished dataset; `arrays` are its columns, as `layout` has them.

    Raises ValueError where nothing was written.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.manifest, self.arrays, self.columns = manifest, layout(manifest), columns_of(manifest)
        self.files = open_objects(manifest.data.path, lambda name: self.columns[name.split("/")[1]].piece)
        if self.files.read_all([f"{FILE}/zarr.json"]) == [None]:
            raise ValueError(f"dataset {manifest.data.path} has no latents yet: run the latents job first")
        self._readers = ThreadPoolExecutor(READERS)
        self._checked: set[tuple[str, int]] = set()  # the files whose index is as it should be

    def valid_rows(self) -> np.ndarray:
        """Indices of the rows that may be trained on, ascending -> int64 (valid,)."""
        return np.flatnonzero(self._whole(VALID))

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of the valid latents by channel; all the same if the dataset says `scalar`."""
        totals = self._whole(SUMS).sum(0)
        if totals[0] == 0:
            raise ValueError(f"dataset {self.manifest.data.path} has no valid row")
        mean, square = totals[1:].reshape(2, -1) / totals[0]
        if self.manifest.data.normalization == "scalar":
            mean, square = np.full_like(mean, mean.mean()), np.full_like(square, square.mean())
        return tuple(mean.tolist()), tuple(np.sqrt(square - mean**2).tolist())

    def read(self, name: str, rows: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """-> (len(rows), ...) in the order of `rows`, in `out` where it is given.

        Raises ValueError for what is missing or is not what was written.
        """
        column = self.columns[name]
        if out is None:
            out = np.empty((len(rows), *column.shape), column.dtype)
        if column.chunk > 1:
            shards, own = np.unique(rows // column.rows, return_inverse=True)
            wholes = np.empty((len(shards), column.rows), column.dtype)
            self._read_rows(column, shards, wholes.view(np.uint8), np.arange(len(shards)))
            out[...] = wholes[own, rows % column.rows]
            return out
        target = out.reshape(-1).view(np.uint8).reshape(len(rows), column.row_bytes)
        parts = np.array_split(np.argsort(rows, kind="stable"), READERS if column.stride > SMALL else 1)
        list(self._readers.map(lambda part: self._read_rows(column, rows[part], target, part), parts))
        return out

    def prefetch(self, names: Iterable[str], rows: np.ndarray, ended: Event) -> None:
        """Makes the blocks quick to read that have one of these rows, until `ended` is set.

        Nothing is done where a sample of them is in memory. What fails here is an error of `read`.
        """
        columns = [self.columns[name] for name in names]
        if not self.files.in_memory(self._blocks(columns, rows[:: -(-len(rows) // SAMPLE)])):
            self.files.prefetch(self._blocks(columns, rows), ended)

    def _blocks(self, columns: Iterable[Column], rows: np.ndarray) -> list[Span]:
        per_shard = self.manifest.rows_per_shard
        spans = [
            (column.file(row // per_shard), *column.span(row % per_shard))
            for column in columns
            for row in rows.tolist()
        ]
        return list(dict.fromkeys(spans))

    def _read_rows(self, column: Column, chunks: np.ndarray, target: np.ndarray, places: np.ndarray) -> None:
        """Ascending chunks of an array, each into its place in the target (B, bytes); neighbours at once."""
        large = column.stride > SMALL
        block = np.empty((len(chunks), CHECKSUM if large else column.stride), np.uint8)
        for start, stop in runs(chunks, column.rows // column.chunk):
            shard, first = divmod(int(chunks[start]), column.rows // column.chunk)
            if (column.name, shard) not in self._checked:
                self._check_index(column, shard)
            if large:
                pairs = zip(places[start:stop].tolist(), block[start:stop], strict=True)
                buffers = [buffer for place, sums in pairs for buffer in (target[place], sums)]
            else:
                buffers = [block[start:stop].reshape(-1)]
            self._read(column, shard, first * column.stride, buffers, stop - start)
        if not large:
            target[places] = block[:, :-CHECKSUM]

    def _check_index(self, column: Column, shard: int) -> None:
        """The index says where chunks lie; other places than ours are another writer's."""
        expected = np.frombuffer(column.index, np.uint8)
        if len(expected):
            found = np.empty_like(expected)
            self._read(column, shard, column.rows * column.stride, [found], 1)
            if not np.array_equal(found, expected):
                raise self._damaged(column, shard, "was written by something else")
        self._checked.add((column.name, shard))

    def _read(self, column: Column, shard: int, start: int, buffers: list[np.ndarray], chunks: int) -> None:
        """Fills the buffers with chunks of one size and their checksums; what a cache has altered is fetched anew."""
        name = column.file(shard)
        stop = start + sum(map(len, buffers))
        for last in (False, True):
            try:
                whole = self.files.readv(name, start, buffers) == stop - start
                if whole and reduce(google_crc32c.extend, buffers, 0) == residue(chunks, (stop - start) // chunks):
                    return
                fault = "has been altered: a checksum is wrong" if whole else "is cut off"
            except OSError as error:
                fault = f"cannot be read: {error.strerror or error}"
            if last or not self.files.forget(name, start, stop):
                raise self._damaged(column, shard, fault)

    def _damaged(self, column: Column, shard: int, fault: str) -> ValueError:
        path = self.manifest.data.path
        return ValueError(f"dataset {path}: array {column.name}, shard {shard}: {column.file(shard)} {fault}")

    def _whole(self, name: str) -> np.ndarray:
        """All rows of a small array, zeros where a shard was not written."""
        column, shards = self.columns[name], range(self.manifest.data.num_shards)
        values = np.zeros((len(shards), column.rows * column.row_bytes), np.uint8)
        for shard, data in zip(shards, self.files.read_all([column.file(shard) for shard in shards]), strict=True):
            if data is not None:
                if len(data) != values.shape[1] + CHECKSUM or data[-CHECKSUM:] != checksum(data[:-CHECKSUM]):
                    raise self._damaged(column, shard, "has been altered")
                values[shard] = np.frombuffer(data[:-CHECKSUM], np.uint8)
        return values.view(column.dtype).reshape(-1, *column.shape)


@cache
def residue(chunks: int, stride: int) -> int:
    """The CRC-32C of so many chunks that each end in their own, `stride` bytes with it.

    A CRC is linear: it is the same whatever they hold, as long as they are whole. So one call checks neighbours.
    """
    zeros = np.zeros(stride - CHECKSUM, np.uint8).tobytes()
    return google_crc32c.value((zeros + checksum(zeros)) * chunks)


def runs(rows: np.ndarray, rows_per_shard: int) -> Iterator[tuple[int, int]]:
    """Start and end of stretches of neighbouring rows of one shard, no longer than one call can read."""
    breaks = (np.diff(rows) != 1) | (rows[1:] % rows_per_shard == 0)
    ends = [*(np.flatnonzero(breaks) + 1).tolist(), len(rows)]
    start = 0
    for end in ends:
        while start < end:
            stop = min(end, start + BUFFERS // 2)
            yield start, stop
            start = stop
