"""The sampling order of training: a two-level shuffle that is a pure function of seed, epoch and position.

A block is a run of consecutive rows of one shard. Every epoch assigns the blocks to windows, one block from each
stretch of the dataset to each window, and shuffles the rows within each window. Reading in this order accesses entire
blocks within a short time, which suits disks and networks, while a batch contains about one row per block. The order
uses the raw output of a counter-based generator, so that it does not depend on the version of a library.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from pixart.data.store.layout import BLOCK

WINDOW = 8192  # rows that are shuffled together; smaller datasets, below twice this size, have a single window

# Independent streams of random numbers; those of an aspect bucket's order follow those of the previous bucket.
BLOCKS, ROWS, COND_DROPOUT, SHORT_CAPTION, VALIDATION, SCHEDULE = range(6)
STREAMS_PER_BUCKET = 8


def random_numbers(count: int, seed: int, index: int, stream: int, part: int = 0) -> np.ndarray:
    """Return random numbers, uint64 (count,), independent for each seed, index, stream and part."""
    return np.random.Philox(key=[seed, index], counter=[0, 0, part, stream]).random_raw(count)


class WindowShuffleSampler:
    """The sampling order of the rows `valid`, ascending indices into a store with `rows_per_shard` rows per shard.

    `bucket` is the aspect bucket that all rows are of, and `chunks` are the numbers of their chunks, by which they are
    stored (`BucketChunks`). About `window` rows are shuffled together.
    """

    def __init__(
        self,
        valid: np.ndarray,
        *,
        rows_per_shard: int,
        seed: int,
        chunks: np.ndarray | None = None,
        bucket: int = 0,
        window: int = WINDOW,
    ) -> None:
        chunks = valid if chunks is None else chunks
        shards = np.arange(0, chunks[-1] + 1, rows_per_shard)
        starts = (shards[:, None] + np.arange(0, rows_per_shard, BLOCK)).ravel()
        self.bounds = np.unique(np.append(np.searchsorted(chunks, starts), len(valid)))  # of blocks, within `valid`
        self.valid, self.seed, self.first_stream, self.window_size = valid, seed, STREAMS_PER_BUCKET * bucket, window
        self._windows = lru_cache(maxsize=2)(self._assign_blocks)
        self.window = lru_cache(maxsize=3)(self._shuffle_window)

    def _assign_blocks(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the blocks of each window of an epoch, and the position in the epoch at which each window ends."""
        blocks = len(self.bounds) - 1
        windows = max(1, len(self.valid) // self.window_size)
        stretches = -(-blocks // windows)
        numbers = random_numbers(stretches * windows, self.seed, epoch, self.first_stream + BLOCKS).reshape(
            stretches, windows
        )
        assigned = np.argsort(numbers, axis=1, kind="stable") + windows * np.arange(stretches)[:, None]
        members = [window[window < blocks] for window in assigned.T]
        sizes = np.diff(self.bounds)
        return members, np.cumsum([sizes[window].sum() for window in members])

    def blocks(self, epoch: int, index: int) -> np.ndarray:
        """Return the first row of each block of a window."""
        return self.valid[self.bounds[self._windows(epoch)[0][index]]]

    def _shuffle_window(self, epoch: int, index: int) -> np.ndarray:
        """Return the rows of a window of an epoch in sampling order."""
        blocks = self._windows(epoch)[0][index]
        rows = np.concatenate([self.valid[self.bounds[block] : self.bounds[block + 1]] for block in blocks])
        numbers = random_numbers(len(rows), self.seed, epoch, self.first_stream + ROWS, index)
        return rows[np.argsort(numbers, kind="stable")]

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int, slice]]:
        """Yield the slices of windows, (epoch, window, slice), at positions start to stop - 1 over all epochs."""
        while start < stop:
            epoch, offset = divmod(start, len(self.valid))
            ends = self._windows(epoch)[1]
            window = int(np.searchsorted(ends, offset, side="right"))
            window_start = self.window_start(epoch, window)
            count = min(stop - start, int(ends[window]) - offset)
            yield epoch, window, slice(offset - window_start, offset - window_start + count)
            start += count

    def window_start(self, epoch: int, window: int) -> int:
        """Return the position in an epoch at which a window starts."""
        return int(self._windows(epoch)[1][window - 1]) if window else 0

    def next_window(self, epoch: int, window: int) -> tuple[int, int]:
        """Return the epoch and index of the window that follows another."""
        return (epoch, window + 1) if window + 1 < len(self._windows(epoch)[1]) else (epoch + 1, 0)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Return the rows at positions start to stop - 1 over all epochs, int64 (stop - start,).

        Every epoch contains each valid row once, and the positions may extend into the next epoch.
        """
        parts = [self.window(epoch, window)[part] for epoch, window, part in self.spans(start, stop)]
        return np.concatenate(parts) if parts else self.valid[:0]


def select_validation_rows(valid: np.ndarray, count: int) -> np.ndarray:
    """Select `count` of the valid rows, at most a tenth, that are excluded from training; ascending, int64.

    The selection depends only on the number of valid rows, so it is the same for every run on a dataset.
    """
    count = min(count, len(valid) // 10)
    numbers = random_numbers(len(valid), 0, 0, VALIDATION)
    return np.sort(valid[np.argpartition(numbers, count)[:count]])
