"""The batches of training: which rows a step takes, what is dropped of them, and reading them ahead of time."""

import math
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from mmap import mmap
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixart.data.loading.sampler import DROP, SHORT, Order, random_numbers
from pixart.data.store.zarr_store import Store

PIN = torch.cuda.is_available()
LARGE = 1 << 16  # bytes of a row that is not read by windows


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One rank's part of a step, in pinned memory where there is CUDA."""

    rows: np.ndarray  # (B,) of the store
    latents: Tensor  # (B, C, h, w) float16, raw scale
    label: Tensor  # (B,) int32, -1 where there is none
    dropped: Tensor  # (B,) bool, whether the condition is left out, for guidance
    token_ids: Tensor  # (B, L), of the caption that was chosen
    token_mask: Tensor  # (B, L) bool
    text_states: Tensor | None  # (B, L, text_dim) float16 where the store keeps them

    def part(self, rows: slice) -> "Batch":
        """Some of the rows, without a copy."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        parts: dict[str, Any] = {name: None if value is None else value[rows] for name, value in values.items()}
        return Batch(**parts)


class Loader:
    """Batches of one rank, read ahead of time.

    Rows, drops (a share of `drop`) and the choice of short captions (a share of `short`) are pure functions of seed
    and step over the whole global batch, of which every rank has its contiguous part: they do not depend on the
    number of ranks. `states`: whether text states are read. `held_out`: rows that are never taken.

    What a rank needs of a window is read at once, block by block and each row straight into its place, while the
    window before it is in use; rows that are too large for that are read by batches, `ahead` steps early.
    """

    def __init__(
        self,
        store: Store,
        *,
        batch: int,
        seed: int,
        drop: float = 0.0,
        short: float = 0.0,
        states: bool = True,
        rank: int = 0,
        world: int = 1,
        ahead: int = 2,
        held_out: np.ndarray | None = None,
    ) -> None:
        path, data = store.manifest.data.path, store.manifest.data
        if batch % world:
            raise ValueError(f"the global batch of {batch} does not divide over {world} ranks")
        if short > 0 and not data.short_captions:
            raise ValueError(
                f"short_caption_prob={short}: dataset {path} has no short captions, data.short_captions is false"
            )
        valid = store.valid_rows()
        if held_out is not None:
            valid = np.setdiff1d(valid, held_out, assume_unique=True)
        if len(valid) == 0:
            raise ValueError(f"dataset {path} has no valid row to train on: run the latents job first")
        self.store, self.batch, self.seed, self.drop, self.short, self.ahead = store, batch, seed, drop, short, ahead
        self.part = slice(rank * batch // world, (rank + 1) * batch // world)
        self.order = Order(valid, rows_per_shard=store.manifest.rows_per_shard, seed=seed)
        self.text = ("token_ids", "token_mask", "text_states")[: 3 if states and data.store_text_embeddings else 2]
        names = ["latents", "label", *self.text, *(f"short_{name}" for name in self.text if short > 0)]
        self.by_window = [name for name in names if store.columns[name].row_bytes <= LARGE]
        self.names = names
        self._windows: dict[tuple[int, int], Future[Window]] = {}
        self._reader, self._prefetcher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._ended = Event()
        self._memory = Memory()

    def read(self, step: int) -> Batch:
        """This rank's contiguous part of the step's global batch."""
        start = step * self.batch
        spans = list(self.order.spans(start + self.part.start, start + self.part.stop))
        last = spans[-1][:2]
        self._read_ahead([*(span[:2] for span in spans), self.order.after(*last)])
        parts = [(self._windows[epoch, index].result(), part) for epoch, index, part in spans]
        rows = np.concatenate([window.rows[window.own(part)] for window, part in parts])
        short = self._drawn(step, SHORT, self.short)

        def column(name: str, chosen: np.ndarray | None = None) -> Tensor:
            if name in self.by_window:
                pieces = [window.columns[name][window.own(part)] for window, part in parts]
                whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces, out=self._empty(name, len(rows)))
                return whole if chosen is None else whole[chosen]
            return self._read_rows(name, rows if chosen is None else rows[chosen])

        def caption(name: str) -> Tensor:
            if not short.any():
                return column(name)
            values = self._empty(name, len(rows))
            values[~short], values[short] = column(name, ~short), column(f"short_{name}", short)
            return values

        return Batch(
            rows=rows,
            latents=column("latents"),
            label=column("label"),
            dropped=pin(torch.from_numpy(self._drawn(step, DROP, self.drop))),
            token_ids=caption("token_ids"),
            token_mask=caption("token_mask"),
            text_states=caption("text_states") if "text_states" in self.text else None,
        )

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """The batches of steps start to stop - 1. Nothing is fetched ahead any more once this has ended."""
        pool = ThreadPoolExecutor(max_workers=1)
        self._ended.clear()
        try:
            pending = [pool.submit(self.read, step) for step in range(start, min(start + self.ahead, stop))]
            for step in range(start, stop):
                if step + self.ahead < stop:
                    pending.append(pool.submit(self.read, step + self.ahead))
                yield pending.pop(0).result()
        finally:
            self._ended.set()
            pool.shutdown(cancel_futures=True)

    def _drawn(self, step: int, use: int, share: float) -> np.ndarray:
        """-> bool, this rank's part of a draw over the global batch."""
        if share == 0:
            return np.zeros(self.part.stop - self.part.start, bool)
        return random_numbers(self.batch, self.seed, step, use)[self.part] < share * 2.0**64

    def _read_ahead(self, keys: list[tuple[int, int]]) -> None:
        """Has these windows read, if they are not, and lets go of others."""
        for key in self._windows.keys() - keys:
            self._windows.pop(key).cancel()
        for key in keys:
            if key not in self._windows:
                self._prefetcher.submit(self._prefetch, *key)
                self._windows[key] = self._reader.submit(self._read_window, *key)

    def _prefetch(self, epoch: int, index: int) -> None:
        self.store.prefetch(self.names, self.order.blocks(epoch, index), self._ended)

    def _read_window(self, epoch: int, index: int) -> "Window":
        rows = self.order.window(epoch, index)
        first = epoch * len(self.order.valid) + self.order.begin(epoch, index)
        places = np.arange(first, first + len(rows)) % self.batch
        mine = (places >= self.part.start) & (places < self.part.stop)
        rows, before = rows[mine], np.concatenate([[0], np.cumsum(mine)])
        return Window(rows=rows, before=before, columns={name: self._read_rows(name, rows) for name in self.by_window})

    def _read_rows(self, name: str, rows: np.ndarray) -> Tensor:
        values = self._empty(name, len(rows))
        self.store.read(name, rows, values.numpy())
        return values

    def _empty(self, name: str, rows: int) -> Tensor:
        shape, dtype = self.store.arrays[name]
        if PIN:  # torch keeps pinned memory for the next that asks
            return torch.empty((rows, *shape), dtype=getattr(torch, dtype), pin_memory=True)
        return self._memory.empty((rows, *shape), np.dtype(dtype))


def rows_batch(store: Store, rows: np.ndarray, *, states: bool) -> Batch:
    """A batch of just these rows, nothing of them dropped."""

    def column(name: str) -> Tensor:
        return torch.from_numpy(store.read(name, rows))

    return Batch(
        rows=rows,
        latents=column("latents"),
        label=column("label"),
        dropped=torch.zeros(len(rows), dtype=torch.bool),
        token_ids=column("token_ids"),
        token_mask=column("token_mask"),
        text_states=column("text_states") if states and store.manifest.data.store_text_embeddings else None,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """What one rank has of a window of the order."""

    rows: np.ndarray
    before: np.ndarray  # how many rows of this rank come before each place of the window
    columns: dict[str, Tensor]

    def own(self, part: slice) -> slice:
        return slice(int(self.before[part.start]), int(self.before[part.stop]))


class Memory:
    """Large arrays, the memory of which is used again when the last tensor that has it is gone.

    Fresh memory costs more than reading into it: the system has to clear it first, and to look for huge pages where
    they are asked for, as numpy does.
    """

    def __init__(self) -> None:
        self.free: dict[int, list[np.ndarray]] = {}

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
        needed = math.prod(shape) * dtype.itemsize
        size = 1 << max(12, (needed - 1).bit_length() - 3)
        size *= -(-needed // size)  # few sizes, at most an eighth more than needed
        free = self.free.setdefault(size, [])
        memory = free.pop() if free else np.frombuffer(mmap(-1, size), np.uint8)
        values = memory[:needed].view(dtype).reshape(shape)
        weakref.finalize(values, free.append, memory).atexit = False
        return torch.from_numpy(values)


def pin(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if PIN else tensor
