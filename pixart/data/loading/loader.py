"""The training data loader: deterministic batches, conditioning dropout and prefetching."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pixart.data.loading.buffers import BufferPool, pin
from pixart.data.loading.order import training_order
from pixart.data.loading.sampler import COND_DROPOUT, SHORT_CAPTION, random_numbers
from pixart.data.loading.windows import WindowReader
from pixart.data.store.layout import LATENTS
from pixart.data.store.zarr_store import Store

MAX_WINDOW_ROW_BYTES = 1 << 16  # columns with larger rows are read per batch instead of per window


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The samples of one rank for one step, in pinned memory if CUDA is available."""

    rows: np.ndarray  # (B,) row indices of the store
    latents: Tensor  # (B, C, h, w) float16, not normalized
    label: Tensor  # (B,) int32, -1 if the source has no labels
    dropped: Tensor  # (B,) bool, whether the conditioning is dropped for classifier-free guidance
    token_ids: Tensor  # (B, L) int32, of the selected caption
    token_mask: Tensor  # (B, L) bool
    text_states: Tensor | None  # (B, L, text_dim) float16, None if not stored or not requested

    def slice_rows(self, rows: slice) -> "Batch":
        """Return a slice of the rows without copying."""
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        sliced: dict[str, Any] = {name: None if value is None else value[rows] for name, value in values.items()}
        return Batch(**sliced)


class Loader:
    """A prefetching loader of the batches of one rank.

    The sampled rows, conditioning dropout and the choice of short captions are pure functions of seed and step over
    the global batch, of which every rank loads a contiguous slice: they do not depend on the number of ranks. All
    images of a global batch are of one aspect bucket.

    The rows of a rank in a shuffle window are read block by block while the previous window is in use. Columns whose
    rows are too large for that are read per batch, `prefetch_steps` steps ahead.

    Raises ValueError if the dataset has no valid row or no short captions that are requested, or if the global batch
    size is not a multiple of the number of ranks, or if an aspect bucket has fewer rows than there are ranks.
    """

    def __init__(
        self,
        store: Store,
        *,
        global_batch_size: int,
        seed: int,
        cond_dropout_prob: float = 0.0,
        short_caption_prob: float = 0.0,
        text_embeddings: bool = True,
        rank: int = 0,
        world_size: int = 1,
        prefetch_steps: int = 2,
        excluded_rows: np.ndarray | None = None,
    ) -> None:
        path, data = store.manifest.data.path, store.manifest.data
        if global_batch_size % world_size:
            raise ValueError(f"global_batch_size={global_batch_size}: must be a multiple of the {world_size} ranks")
        if short_caption_prob > 0 and not data.short_captions:
            raise ValueError(
                f"short_caption_prob={short_caption_prob}: dataset {path} has no short captions; "
                "create it with data.short_captions=true"
            )
        valid = store.valid_rows()
        if excluded_rows is not None:
            valid = np.setdiff1d(valid, excluded_rows, assume_unique=True)
        if len(valid) == 0:
            raise ValueError(f"dataset {path} has no valid rows; run 'latents' first")
        self.store, self.global_batch_size, self.seed = store, global_batch_size, seed
        self.cond_dropout_prob, self.short_caption_prob = cond_dropout_prob, short_caption_prob
        self.prefetch_steps = prefetch_steps
        self.local = slice(rank * global_batch_size // world_size, (rank + 1) * global_batch_size // world_size)
        self.text_columns = [
            "token_ids",
            "token_mask",
            *(["text_states"] if text_embeddings and data.store_text_embeddings else []),
        ]
        short_columns = [f"short_{name}" for name in self.text_columns if short_caption_prob > 0]
        self.order = training_order(store, valid, global_batch_size=global_batch_size, seed=seed)
        self._cancelled, self._buffers = Event(), BufferPool()
        reader, prefetcher = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.readers: list[WindowReader] = []
        for sampler in self.order.samplers:
            latents = store.latents_column(sampler.valid[:1])
            if store.manifest.buckets and len(sampler.valid) < world_size:
                raise ValueError(
                    f"dataset {path}: its aspect bucket {latents.partition('_')[2]} has {len(sampler.valid)} rows for "
                    f"{world_size} ranks; create it with fewer buckets"
                )
            columns = [latents, "label", *self.text_columns, *short_columns]
            self.readers.append(
                WindowReader(
                    store,
                    sampler,
                    columns=columns,
                    window_columns=[name for name in columns if store.columns[name].row_bytes <= MAX_WINDOW_ROW_BYTES],
                    local=self.local,
                    global_batch_size=global_batch_size,
                    buffers=self._buffers,
                    cancelled=self._cancelled,
                    reader=reader,
                    prefetcher=prefetcher,
                )
            )

    def read(self, step: int) -> Batch:
        """Return this rank's slice of the global batch of a step."""
        index, start = self.order.batch(step)
        reader = self.readers[index]
        windows = reader.read(start)
        rows = np.concatenate([window.rows[window.local_slice(positions)] for window, positions in windows])
        short = self._sample_mask(step, SHORT_CAPTION, self.short_caption_prob)

        def column(name: str, selected: np.ndarray | None = None) -> Tensor:
            if name in reader.window_columns:
                parts = [window.columns[name][window.local_slice(positions)] for window, positions in windows]
                values = parts[0]
                if len(parts) > 1:
                    values = self._buffers.column(self.store, name, len(rows))
                    # torch.cat would wait for its threads, which readers and training keep busy.
                    np.concatenate([part.numpy() for part in parts], out=values.numpy())
                return values if selected is None else values[selected]
            return self._buffers.read(self.store, name, rows if selected is None else rows[selected])

        def caption(name: str) -> Tensor:
            if not short.any():
                return column(name)
            values = self._buffers.column(self.store, name, len(rows))
            values[~short], values[short] = column(name, ~short), column(f"short_{name}", short)
            return values

        return Batch(
            rows=rows,
            latents=column(reader.columns[0]),
            label=column("label"),
            dropped=pin(torch.from_numpy(self._sample_mask(step, COND_DROPOUT, self.cond_dropout_prob))),
            token_ids=caption("token_ids"),
            token_mask=caption("token_mask"),
            text_states=caption("text_states") if "text_states" in self.text_columns else None,
        )

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the batches of steps start to stop - 1. Closing the iterator stops prefetching."""
        pool = ThreadPoolExecutor(max_workers=1)
        self._cancelled.clear()
        try:
            pending = [pool.submit(self.read, step) for step in range(start, min(start + self.prefetch_steps, stop))]
            for step in range(start, stop):
                if step + self.prefetch_steps < stop:
                    pending.append(pool.submit(self.read, step + self.prefetch_steps))
                yield pending.pop(0).result()
        finally:
            self._cancelled.set()
            pool.shutdown(cancel_futures=True)

    def _sample_mask(self, step: int, stream: int, probability: float) -> np.ndarray:
        """Return this rank's slice of a Bernoulli sample over the global batch, bool (B,)."""
        if probability == 0:
            return np.zeros(self.local.stop - self.local.start, bool)
        return random_numbers(self.global_batch_size, self.seed, step, stream)[self.local] < probability * 2.0**64


def load_rows(store: Store, rows: np.ndarray, *, text_embeddings: bool) -> Batch:
    """Load a batch of the given rows, which are of one aspect bucket, without dropout."""

    def column(name: str) -> Tensor:
        return torch.from_numpy(store.read(name, rows))

    return Batch(
        rows=rows,
        latents=column(LATENTS),
        label=column("label"),
        dropped=torch.zeros(len(rows), dtype=torch.bool),
        token_ids=column("token_ids"),
        token_mask=column("token_mask"),
        text_states=column("text_states") if text_embeddings and store.manifest.data.store_text_embeddings else None,
    )
