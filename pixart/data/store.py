"""The training set: written a whole shard at a time by one writer, read at random rows.

`valid` is written last and fills with 0, so that rows of an unfinished shard are never read. Rows are read by plain
system calls straight into their place in a batch, several times faster than by a library for Zarr.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import google_crc32c
import numpy as np

from pixart.data.columns import BUFFERS, CHECKSUM, FILE, SUMS, VALID, columns_of, create, layout, write_file
from pixart.data.columns import Column as Column
from pixart.data.manifest import Manifest
from pixart.data.objects import open_objects
from pixart.data.order import BLOCK

__all__ = ["Store", "create", "layout", "write_shard"]

READERS = 2  # threads for the rows of one batch
FETCHERS = 32  # threads for blocks that will be read


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
        self._readers, self._fetchers = ThreadPoolExecutor(READERS), ThreadPoolExecutor(FETCHERS)
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
            shards, places = np.divmod(rows, column.rows)
            for shard in np.unique(shards).tolist():
                whole = np.empty(column.rows, column.dtype)
                self._read_chunks(column, shard, 0, [whole.view(np.uint8)])
                out[shards == shard] = whole[places[shards == shard]]
            return out
        target = out.reshape(-1).view(np.uint8).reshape(len(rows), column.row_bytes)
        parts = np.array_split(np.argsort(rows, kind="stable"), READERS)
        list(self._readers.map(lambda part: self._read_rows(column, rows[part], target, part.tolist()), parts))
        return out

    def prefetch(self, names: Iterable[str], rows: np.ndarray) -> None:
        """Makes the blocks of rows quick to read. What fails here is an error of `read`."""
        shards, places = np.divmod(rows, self.manifest.rows_per_shard)
        blocks = np.unique(np.stack([shards, places // BLOCK]), axis=1).T.tolist()
        wanted = {self._span(self.columns[name], shard, block) for shard, block in blocks for name in names}
        for future in [self._fetchers.submit(self.files.prefetch, *span) for span in sorted(wanted)]:
            future.exception()

    def _span(self, column: Column, shard: int, block: int) -> tuple[str, int, int]:
        first, stop = (0, 1) if column.chunk > 1 else (block * BLOCK, min((block + 1) * BLOCK, column.rows))
        return column.file(shard), first * column.stride, stop * column.stride

    def _read_rows(self, column: Column, rows: np.ndarray, target: np.ndarray, places: list[int]) -> None:
        """Ascending rows, each into its place in the target; those that lie side by side at once."""
        for start, stop in runs(rows, column.rows):
            shard, first = divmod(int(rows[start]), column.rows)
            self._read_chunks(column, shard, first, [target[place] for place in places[start:stop]])

    def _read_chunks(self, column: Column, shard: int, first: int, chunks: Sequence[np.ndarray]) -> None:
        """Neighbouring chunks from `first` on, each into its array of bytes."""
        if column.chunk < column.rows and (column.name, shard) not in self._checked:
            index = np.empty(len(column.index), np.uint8)
            same = lambda: index.tobytes() == column.index  # noqa: E731
            self._read(column, shard, column.rows // column.chunk * column.stride, [index], same)
            self._checked.add((column.name, shard))
        sums = np.empty((len(chunks), CHECKSUM), np.uint8)
        buffers = [buffer for pair in zip(chunks, sums, strict=True) for buffer in pair]
        same = lambda: [google_crc32c.value(chunk) for chunk in chunks] == sums.view("<u4")[:, 0].tolist()  # noqa: E731
        self._read(column, shard, first * column.stride, buffers, same)

    def _read(
        self, column: Column, shard: int, start: int, buffers: list[np.ndarray], same: Callable[[], bool]
    ) -> None:
        """Bytes of one file; what a cache has of them is fetched anew where it is not what was written."""
        name, length = column.file(shard), sum(buffer.size for buffer in buffers)
        for last in (False, True):
            try:
                whole = self.files.readv(name, start, buffers) == length
                if whole and same():
                    return
                fault = "has been altered: its checksum is another" if whole else "is cut off"
            except OSError as error:
                fault = f"cannot be read: {error.strerror or error}"
            if last or not self.files.forget(name, start, start + length):
                break
        path = self.manifest.data.path
        raise ValueError(f"dataset {path}: array {column.name}, shard {shard}: {name} {fault}; encode the shard again")

    def _whole(self, name: str) -> np.ndarray:
        """All rows of a small array, zeros where a shard was not written."""
        column, shards = self.columns[name], range(self.manifest.data.shards)
        values = np.zeros((len(shards), column.rows * column.row_bytes), np.uint8)
        for shard, data in zip(shards, self.files.read_all([column.file(shard) for shard in shards]), strict=True):
            if data is not None:
                if data[-CHECKSUM:] != google_crc32c.value(data[:-CHECKSUM]).to_bytes(CHECKSUM, "little"):
                    raise ValueError(
                        f"dataset {self.manifest.data.path}: array {name}, shard {shard}: has been altered"
                    )
                values[shard] = np.frombuffer(data[:-CHECKSUM], np.uint8)
        return values.view(column.dtype).reshape(-1, *column.shape)


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
