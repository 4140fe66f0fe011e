"""The order of training: which rows the global batch of each step has.

In a dataset with aspect buckets all images of a batch are of one bucket, and each bucket has its own sampling order.
Every epoch takes as many batches of a bucket as its rows fill, in an order that is shuffled over the buckets. Rows that
fill no batch are carried over to the next epoch, so that each valid row is sampled once per epoch, up to a rest of less
than one batch per bucket. All of it is a pure function of seed and step.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from pixart.data.loading.sampler import SCHEDULE, WINDOW, WindowShuffleSampler, random_numbers
from pixart.data.store.zarr_store import Store

BATCHES_PER_WINDOW = 4  # at least, so that the rows of a block are spread over several batches


class TrainingOrder:
    """The rows of each step's global batch, by one sampler per aspect bucket that has rows."""

    def __init__(self, samplers: Sequence[WindowShuffleSampler], *, global_batch_size: int, seed: int) -> None:
        self.samplers, self.global_batch_size, self.seed = samplers, global_batch_size, seed
        self.sizes = np.array([len(sampler.valid) for sampler in samplers])
        self._epoch_batches = lru_cache(maxsize=2)(self._shuffle_batches)

    def batch(self, step: int) -> tuple[int, int]:
        """Return the index of the sampler of a step's batch, and the position in its order where the batch starts."""
        if len(self.samplers) == 1:
            return 0, step * self.global_batch_size
        epoch = self._epoch_of(step)
        bucket, index = self._epoch_batches(epoch)
        offset = step - int(self._batches_before(epoch).sum())
        return int(bucket[offset]), int(index[offset]) * self.global_batch_size

    def rows(self, step: int) -> np.ndarray:
        """Return the rows of the global batch of a step, int64 (global_batch_size,)."""
        sampler, start = self.batch(step)
        return self.samplers[sampler].rows(start, start + self.global_batch_size)

    def _batches_before(self, epoch: int) -> np.ndarray:
        """Return the number of batches of each bucket in all earlier epochs."""
        return epoch * self.sizes // self.global_batch_size

    def _epoch_of(self, step: int) -> int:
        """Return the epoch that a step is in, by bisection over the number of batches before each epoch."""
        low, high = 0, 1 + (step + len(self.sizes)) * self.global_batch_size // int(self.sizes.sum())
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._batches_before(middle).sum() <= step else (low, middle)
        return low

    def _shuffle_batches(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the bucket of each batch of an epoch, and its index among the batches of that bucket in all epochs."""
        begins, ends = self._batches_before(epoch), self._batches_before(epoch + 1)
        bucket = np.repeat(np.arange(len(begins)), ends - begins)
        index = np.concatenate([np.arange(begin, end) for begin, end in zip(begins, ends, strict=True)])
        shuffled = np.argsort(random_numbers(len(bucket), self.seed, epoch, SCHEDULE), kind="stable")
        buckets = bucket[shuffled]
        # Batches of one bucket stay in their order, as its sampler reads ahead.
        places = np.argsort(buckets, kind="stable")
        indices = np.empty_like(index)
        indices[places] = index
        return buckets, indices


def training_order(store: Store, valid: np.ndarray, *, global_batch_size: int, seed: int) -> TrainingOrder:
    """Return the order of training on the rows `valid` of a store, ascending."""
    manifest = store.manifest
    if not manifest.buckets:
        samplers = [WindowShuffleSampler(valid, rows_per_shard=manifest.rows_per_shard, seed=seed)]
        return TrainingOrder(samplers, global_batch_size=global_batch_size, seed=seed)
    buckets = store.bucket_of(valid)
    samplers = []
    for bucket in np.unique(buckets).tolist():
        rows = valid[buckets == bucket]
        share = WINDOW * len(rows) // len(valid)
        samplers.append(
            WindowShuffleSampler(
                rows,
                chunks=store.chunks.chunk_of[rows],
                rows_per_shard=manifest.rows_per_shard,
                seed=seed,
                bucket=bucket,
                window=max(share, min(WINDOW, BATCHES_PER_WINDOW * global_batch_size)),
            )
        )
    return TrainingOrder(samplers, global_batch_size=global_batch_size, seed=seed)
