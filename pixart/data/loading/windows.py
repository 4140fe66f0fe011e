"""Reading of shuffle windows: the rows of one rank, block by block, while the previous window is in use."""

from collections.abc import Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from threading import Event

import numpy as np
from torch import Tensor

from pixart.data.loading.buffers import BufferPool
from pixart.data.loading.sampler import WindowShuffleSampler
from pixart.data.store.zarr_store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """The rows of one rank in a shuffle window."""

    rows: np.ndarray
    offsets: np.ndarray  # number of this rank's rows before each position of the window
    columns: dict[str, Tensor]

    def local_slice(self, positions: slice) -> slice:
        """Convert a slice of the window's positions to a slice of this rank's rows."""
        return slice(int(self.offsets[positions.start]), int(self.offsets[positions.stop]))


class WindowReader:
    """Reads the windows of one sampler: those in use, and the next one.

    `columns` are all columns that batches have, `window_columns` those that are read per window. `local` are the
    positions of this rank in a global batch.
    """

    def __init__(
        self,
        store: Store,
        sampler: WindowShuffleSampler,
        *,
        columns: Sequence[str],
        window_columns: Sequence[str],
        local: slice,
        global_batch_size: int,
        buffers: BufferPool,
        reader: Executor,
        prefetcher: Executor,
        cancelled: Event,
    ) -> None:
        self.store, self.sampler, self.columns, self.window_columns = store, sampler, columns, window_columns
        self.local, self.global_batch_size, self.buffers = local, global_batch_size, buffers
        self._reader, self._prefetcher, self._cancelled = reader, prefetcher, cancelled
        self._windows: dict[tuple[int, int], Future[Window]] = {}

    def read(self, start: int) -> list[tuple[Window, slice]]:
        """Return this rank's part of the batch at position `start` of the order, as slices of windows."""
        spans = list(self.sampler.spans(start + self.local.start, start + self.local.stop))
        last = spans[-1][:2]
        self._prefetch_windows([*(span[:2] for span in spans), self.sampler.next_window(*last)])
        return [(self._windows[epoch, index].result(), positions) for epoch, index, positions in spans]

    def _prefetch_windows(self, keys: list[tuple[int, int]]) -> None:
        """Start reading these windows, unless they are already being read, and release all others."""
        for key in self._windows.keys() - keys:
            self._windows.pop(key).cancel()
        for key in keys:
            if key not in self._windows:
                self._prefetcher.submit(self._prefetch, *key)
                self._windows[key] = self._reader.submit(self._read_window, *key)

    def _prefetch(self, epoch: int, index: int) -> None:
        self.store.prefetch(self.columns, self.sampler.blocks(epoch, index), self._cancelled)

    def _read_window(self, epoch: int, index: int) -> Window:
        rows = self.sampler.window(epoch, index)
        first = epoch * len(self.sampler.valid) + self.sampler.window_start(epoch, index)
        positions = np.arange(first, first + len(rows)) % self.global_batch_size
        is_local = (positions >= self.local.start) & (positions < self.local.stop)
        rows, offsets = rows[is_local], np.concatenate([[0], np.cumsum(is_local)])
        columns = {name: self.buffers.read(self.store, name, rows) for name in self.window_columns}
        return Window(rows=rows, offsets=offsets, columns=columns)
