"""The order of training: which rows make up which step, and reading them ahead of time."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from pixart.data.store import Store


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    rows: np.ndarray  # (B,) of the store
    latents: Tensor  # (B, C, h, w) float16, raw scale
    label: Tensor  # (B,), -1 where there is none
    token_ids: Tensor  # (B, L)
    token_mask: Tensor  # (B, L) bool
    text_states: Tensor | None  # (B, L, text_dim) float16 where the store keeps them


def rows_of_step(valid: np.ndarray, step: int, batch: int, seed: int) -> np.ndarray:
    """The global batch of a step -> (batch,). A pure function: a resumed run and any number of ranks agree.

    Epochs are permutations of the valid rows one after the other, each of its own random numbers; a batch may
    reach from one into the next.
    """
    places = np.arange(step * batch, (step + 1) * batch)
    epochs, offsets = np.divmod(places, len(valid))
    rows = np.empty(batch, dtype=valid.dtype)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        rows[chosen] = valid[permutation(len(valid), seed, int(epoch))[offsets[chosen]]]
    return rows


@lru_cache(maxsize=2)  # a batch touches two epochs at most, unless the dataset is smaller than a batch
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)


class Loader:
    """Batches of one rank from step `start` on, read `ahead` steps early by a thread."""

    def __init__(self, store: Store, *, batch: int, seed: int, rank: int = 0, world: int = 1, ahead: int = 2) -> None:
        if batch % world:
            raise ValueError(f"the global batch of {batch} does not divide over {world} ranks")
        self.store, self.batch, self.seed, self.rank, self.world, self.ahead = store, batch, seed, rank, world, ahead
        self.valid = store.valid_rows()
        if len(self.valid) == 0:
            raise ValueError(f"dataset {store.manifest.data.path} has no valid row: run the latents job first")

    def read(self, step: int) -> Batch:
        """This rank's contiguous part of the step's global batch."""
        rows = rows_of_step(self.valid, step, self.batch, self.seed)
        rows = np.split(rows, self.world)[self.rank]
        columns = {name: torch.from_numpy(self.store.read(name, rows)) for name in self.store.arrays if name != "valid"}
        return Batch(
            rows=rows,
            latents=columns["latents"],
            label=columns["label"].long(),
            token_ids=columns["token_ids"],
            token_mask=columns["token_mask"],
            text_states=columns.get("text_states"),
        )

    def iterate(self, start: int, stop: int) -> Iterator[Batch]:
        with ThreadPoolExecutor(max_workers=1) as pool:
            pending = [pool.submit(self.read, step) for step in range(start, min(start + self.ahead, stop))]
            for step in range(start, stop):
                if step + self.ahead < stop:
                    pending.append(pool.submit(self.read, step + self.ahead))
                yield pending.pop(0).result()
