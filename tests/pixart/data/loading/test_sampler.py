import numpy as np
import pytest

from pixart.data.loading.sampler import WINDOW, WindowShuffleSampler
from pixart.data.store.layout import BLOCK


def correlation(rows: np.ndarray) -> float:
    """Return the absolute rank correlation of position and row."""
    return abs(float(np.corrcoef(np.arange(len(rows)), np.argsort(np.argsort(rows)))[0, 1]))


def test_every_epoch_is_another_permutation():
    order = WindowShuffleSampler(np.array([3, 5, 8, 9, 20, 21, 22]), rows_per_shard=4, seed=1)
    sampled = np.concatenate([order.rows(4 * step, 4 * step + 4) for step in range(7)])  # 28 = 4 epochs of 7
    epochs = sampled.reshape(4, 7)
    assert (np.sort(epochs, axis=1) == order.valid).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert (order.rows(12, 16) == sampled[12:16]).all()
    assert (WindowShuffleSampler(order.valid, rows_per_shard=4, seed=2).rows(0, 7) != epochs[0]).any()


def test_batch_may_be_larger_than_the_dataset():
    sampled = WindowShuffleSampler(np.arange(3), rows_per_shard=2, seed=0).rows(0, 9).reshape(3, 3)
    assert (np.sort(sampled, axis=1) == np.arange(3)).all()


@pytest.mark.parametrize(("rows", "rows_per_shard"), [(100_003, 1000), (3 * WINDOW + 1, 1036), (2 * WINDOW, 7)])
def test_every_epoch_of_many_windows_is_a_permutation(rows, rows_per_shard):
    valid = np.flatnonzero(np.random.default_rng(0).random(rows) < 0.9)
    order = WindowShuffleSampler(valid, rows_per_shard=rows_per_shard, seed=3)
    epochs = order.rows(0, 2 * len(valid)).reshape(2, -1)
    assert (np.sort(epochs, axis=1) == valid).all()
    assert (epochs[0] != epochs[1]).mean() > 0.99
    assert (order.rows(len(valid) - 700, len(valid) + 700) == epochs.ravel()[len(valid) - 700 : len(valid) + 700]).all()


def test_rows_of_a_block_are_within_one_window():
    order = WindowShuffleSampler(np.arange(40 * WINDOW), rows_per_shard=1024, seed=0)
    positions = np.argsort(order.rows(0, 40 * WINDOW)).reshape(-1, BLOCK)
    assert (np.ptp(positions, axis=1) < WINDOW + BLOCK).all()


@pytest.mark.parametrize("rows", [50_000, 200_000])
def test_position_and_row_are_uncorrelated(rows):
    order = WindowShuffleSampler(np.arange(rows), rows_per_shard=1024, seed=5)
    epoch = order.rows(0, rows)
    assert correlation(epoch) < 0.02
    batches = epoch[: rows // 256 * 256].reshape(-1, 256)
    blocks = [np.unique(batch // BLOCK, return_counts=True)[1] for batch in batches]
    assert max(count.max() for count in blocks) <= 10
    assert np.mean([count.max() for count in blocks]) < 6
    # The mean row of a batch has the same standard deviation as in a full permutation.
    assert abs(batches.mean(1).std() / (rows / np.sqrt(12 * 256)) - 1) < 0.15


def test_small_datasets_are_fully_permuted():
    """Adjacent positions have adjacent rows as often as in full permutations."""
    near, correlations = [], []
    for seed in range(40):
        epoch = WindowShuffleSampler(np.arange(4096), rows_per_shard=16, seed=seed).rows(0, 4096)
        near.append((np.abs(np.diff(epoch)) <= BLOCK).mean())
        correlations.append(correlation(epoch))
    expected = 2 * BLOCK / 4096
    assert abs(np.mean(near) - expected) < 0.003
    assert np.sqrt(np.mean(np.square(correlations))) < 1.5 / np.sqrt(4096)


def test_order_does_not_change():
    """The order depends only on the generator, so that a run can be resumed with later versions of libraries."""
    order = WindowShuffleSampler(np.arange(100_000), rows_per_shard=1024, seed=7)
    assert order.rows(4 * 123, 4 * 124).tolist() == GOLDEN


GOLDEN = [59337, 8950, 29742, 25712]
