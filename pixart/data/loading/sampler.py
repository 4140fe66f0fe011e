"""The order of training: a shuffle of blocks and of rows, a pure function of seed, epoch and position.

A block is a run of neighbouring rows of one shard. An epoch deals the blocks out to windows, so that each window has
one block of every stretch of the dataset, and shuffles the rows inside each window. Whoever reads in this order asks
for whole blocks within a short time, which disks and networks like, and yet takes about one row of each block into a
batch. Random numbers are raw ones of a counter-based generator: no release of a library changes the order.
"""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from pixart.data.store.layout import BLOCK

WINDOW = 8192  # rows that are shuffled together; datasets of fewer than twice as many are shuffled as a whole

EPOCH, ROWS, DROP, SHORT, HELD_OUT = range(5)  # what random numbers are for


def random_numbers(count: int, seed: int, index: int, use: int, part: int = 0) -> np.ndarray:
    """-> uint64 (count,), others for each seed, index, use and part."""
    return np.random.Philox(key=[seed, index], counter=[0, 0, part, use]).random_raw(count)


class Order:
    """The order of the rows `valid`, ascending indices of a store of `rows_per_shard` rows in each shard."""

    def __init__(self, valid: np.ndarray, *, rows_per_shard: int, seed: int) -> None:
        shards = np.arange(0, valid[-1] + 1, rows_per_shard)
        starts = (shards[:, None] + np.arange(0, rows_per_shard, BLOCK)).ravel()
        self.bounds = np.unique(np.append(np.searchsorted(valid, starts), len(valid)))  # of blocks, within `valid`
        self.valid, self.seed = valid, seed
        self._epoch = lru_cache(maxsize=2)(self._deal)
        self.window = lru_cache(maxsize=3)(self._window)

    def _deal(self, epoch: int) -> tuple[list[np.ndarray], np.ndarray]:
        """The blocks of each window, and the position at which each window ends."""
        blocks = len(self.bounds) - 1
        windows = max(1, len(self.valid) // WINDOW)
        stretches = -(-blocks // windows)
        numbers = random_numbers(stretches * windows, self.seed, epoch, EPOCH).reshape(stretches, windows)
        dealt = np.argsort(numbers, axis=1, kind="stable") + windows * np.arange(stretches)[:, None]
        members = [window[window < blocks] for window in dealt.T]
        sizes = np.diff(self.bounds)
        return members, np.cumsum([sizes[window].sum() for window in members])

    def blocks(self, epoch: int, index: int) -> np.ndarray:
        """The first row of each block of a window."""
        return self.valid[self.bounds[self._epoch(epoch)[0][index]]]

    def _window(self, epoch: int, index: int) -> np.ndarray:
        """The rows of one window of an epoch in their order."""
        blocks = self._epoch(epoch)[0][index]
        rows = np.concatenate([self.valid[self.bounds[block] : self.bounds[block + 1]] for block in blocks])
        return rows[np.argsort(random_numbers(len(rows), self.seed, epoch, ROWS, index), kind="stable")]

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int, slice]]:
        """The parts of windows, (epoch, window, part), at positions start to stop - 1, counted over all epochs."""
        while start < stop:
            epoch, offset = divmod(start, len(self.valid))
            ends = self._epoch(epoch)[1]
            window = int(np.searchsorted(ends, offset, side="right"))
            begin = self.begin(epoch, window)
            count = min(stop - start, int(ends[window]) - offset)
            yield epoch, window, slice(offset - begin, offset - begin + count)
            start += count

    def begin(self, epoch: int, window: int) -> int:
        """The position in the epoch at which a window begins."""
        return int(self._epoch(epoch)[1][window - 1]) if window else 0

    def after(self, epoch: int, window: int) -> tuple[int, int]:
        """The window that follows."""
        return (epoch, window + 1) if window + 1 < len(self._epoch(epoch)[1]) else (epoch + 1, 0)

    def rows(self, start: int, stop: int) -> np.ndarray:
        """-> (stop - start,), those of positions start to stop - 1."""
        parts = [self.window(epoch, window)[part] for epoch, window, part in self.spans(start, stop)]
        return np.concatenate(parts) if parts else self.valid[:0]


def rows_of_step(order: Order, step: int, batch: int) -> np.ndarray:
    """The global batch of a step -> (batch,). A pure function: a resumed run and any number of ranks agree.

    Epochs follow one upon the other, each with every valid row once; a batch may reach from one into the next.
    """
    return order.rows(step * batch, (step + 1) * batch)


def held_out_rows(valid: np.ndarray, count: int) -> np.ndarray:
    """`count` of the valid rows, at most a tenth, ascending, that are kept from training; for every run the same."""
    count = min(count, len(valid) // 10)
    numbers = random_numbers(len(valid), 0, 0, HELD_OUT)
    return np.sort(valid[np.argpartition(numbers, count)[:count]])
