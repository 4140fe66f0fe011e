"""Rows that show the same picture: groups of equal digests, and groups of perceptual hashes a few bits apart."""

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

MAX_DISTANCE = 4  # beyond it a band is too narrow to tell millions of hashes apart
BATCH = 4_000_000  # pairs that are found before they are merged


def exact_groups(digests: Sequence[bytes] | np.ndarray) -> list[np.ndarray]:
    """The rows of equal digests of 16 bytes: groups of two and more, each ascending, in the order of their first."""
    return _groups(np.unique(np.asarray(digests, dtype="S16"), return_inverse=True)[1])


def near_groups(phashes: np.ndarray, distance: int = 3) -> list[np.ndarray]:
    """The rows whose hashes, uint64 of (rows,), are linked by steps of at most `distance` bits.

    Hashes that differ in d bits agree in two at least of d + 2 bands, so only those that share two bands are compared
    (as G. Manku et al., "Detecting Near-Duplicates for Web Crawling", 2007). A chain of small steps is one group.
    Groups are as those of `exact_groups`. 14 million hashes of strangers take 45 s on one core and 3.1 GB; within a
    crowd of n hashes that are almost alike, time grows with n * n (100,000 of them: 8 s).
    Raises ValueError for a distance that is not 0 to 4.
    """
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"distance={distance}: must be 0 to {MAX_DISTANCE} bits")
    distinct, of_row = np.unique(phashes.astype(np.uint64, casting="safe"), return_inverse=True)
    labels = np.arange(len(distinct), dtype=np.int32)
    for one, other in combinations(_bands(distance + 2), 2):
        for first, second in _close_pairs(distinct, one | other, distance, labels):
            links = coo_array((np.ones(len(first), dtype=bool), (labels[first], labels[second])), (len(labels),) * 2)
            labels[:] = connected_components(links, directed=False)[1][labels]
    return _groups(labels[of_row])


def _bands(count: int) -> list[np.uint64]:
    """Masks that cut 64 bits into bands of almost equal width."""
    edges = [64 * index // count for index in range(count + 1)]
    return [np.uint64((1 << end) - (1 << start)) for start, end in pairwise(edges)]


def _close_pairs(
    hashes: np.ndarray, mask: np.uint64, distance: int, labels: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of pairs at most `distance` bits apart that agree in `mask` and do not have the same label yet.

    Sorted by the masked bits, equals are a run. Step s compares each hash with the one s places on, if that is still
    in its run, so the memory is that of the hashes whatever the length of a run.
    """
    keys = hashes & mask
    order = np.argsort(keys).astype(np.int32)
    keys, hashes = keys[order], hashes[order]
    at, step, waiting = np.arange(len(keys) - 1, dtype=np.int32), 1, 0
    batch: list[tuple[np.ndarray, np.ndarray]] = []
    while len(at):
        at = at[keys[at] == keys[at + step]]
        close = at[np.bitwise_count(hashes[at] ^ hashes[at + step]) <= distance]
        first, second = order[close], order[close + step]
        new = labels[first] != labels[second]
        batch.append((first[new], second[new]))
        waiting += len(batch[-1][0])
        step += 1
        at = at[at + step < len(keys)]
        if waiting > BATCH or not len(at):
            yield np.concatenate([pair[0] for pair in batch]), np.concatenate([pair[1] for pair in batch])
            batch, waiting = [], 0


def _groups(labels: np.ndarray) -> list[np.ndarray]:
    """The rows of each label that two rows and more have."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels) if len(labels) else np.zeros(0, dtype=np.int64)
    groups = np.split(order, np.cumsum(counts)[:-1])
    return sorted((group for group in groups if len(group) > 1), key=lambda group: int(group[0]))
