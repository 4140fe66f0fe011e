import numpy as np
import pytest

from pixart.data.loading.sampler import WINDOW, Order, rows_of_step
from pixart.data.store.layout import BLOCK


def correlation(rows: np.ndarray) -> float:
    """Of position and source index."""
    return abs(float(np.corrcoef(np.arange(len(rows)), np.argsort(np.argsort(rows)))[0, 1]))


def test_every_row_once_an_epoch_in_another_order():
    order = Order(np.array([3, 5, 8, 9, 20, 21, 22]), rows_per_shard=4, seed=1)
    drawn = np.concatenate([rows_of_step(order, step, 4) for step in range(7)])  # 28 = 4 epochs of 7
    epochs = drawn.reshape(4, 7)
    assert (np.sort(epochs, axis=1) == order.valid).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert (rows_of_step(order, 3, 4) == drawn[12:16]).all()
    assert (rows_of_step(Order(order.valid, rows_per_shard=4, seed=2), 0, 7) != epochs[0]).any()


def test_batch_larger_than_the_dataset():
    drawn = rows_of_step(Order(np.arange(3), rows_per_shard=2, seed=0), 0, 9).reshape(3, 3)
    assert (np.sort(drawn, axis=1) == np.arange(3)).all()


@pytest.mark.parametrize(("rows", "rows_per_shard"), [(100_003, 1000), (3 * WINDOW + 1, 1036), (2 * WINDOW, 7)])
def test_every_row_once_over_many_windows(rows, rows_per_shard):
    valid = np.flatnonzero(np.random.default_rng(0).random(rows) < 0.9)
    order = Order(valid, rows_per_shard=rows_per_shard, seed=3)
    epochs = order.rows(0, 2 * len(valid)).reshape(2, -1)
    assert (np.sort(epochs, axis=1) == valid).all()
    assert (epochs[0] != epochs[1]).mean() > 0.99
    assert (order.rows(len(valid) - 700, len(valid) + 700) == epochs.ravel()[len(valid) - 700 : len(valid) + 700]).all()


def test_blocks_come_within_a_window():
    order = Order(np.arange(40 * WINDOW), rows_per_shard=1024, seed=0)
    positions = np.argsort(order.rows(0, 40 * WINDOW)).reshape(-1, BLOCK)
    assert (np.ptp(positions, axis=1) < WINDOW + BLOCK).all()


@pytest.mark.parametrize("rows", [50_000, 200_000])
def test_position_says_nothing_of_the_source(rows):
    order = Order(np.arange(rows), rows_per_shard=1024, seed=5)
    epoch = order.rows(0, rows)
    assert correlation(epoch) < 0.02
    batches = epoch[: rows // 256 * 256].reshape(-1, 256)
    blocks = [np.unique(batch // BLOCK, return_counts=True)[1] for batch in batches]
    assert max(count.max() for count in blocks) <= 10
    assert np.mean([count.max() for count in blocks]) < 6
    # A batch is spread over the source as one of a full permutation is: its mean index has the same deviation.
    assert abs(batches.mean(1).std() / (rows / np.sqrt(12 * 256)) - 1) < 0.15


def test_small_datasets_are_shuffled_as_a_whole():
    """Neighbours in a batch are neighbours in the source as often as in full permutations."""
    near, correlations = [], []
    for seed in range(40):
        epoch = Order(np.arange(4096), rows_per_shard=16, seed=seed).rows(0, 4096)
        near.append((np.abs(np.diff(epoch)) <= BLOCK).mean())
        correlations.append(correlation(epoch))
    expected = 2 * BLOCK / 4096
    assert abs(np.mean(near) - expected) < 0.003
    assert np.sqrt(np.mean(np.square(correlations))) < 1.5 / np.sqrt(4096)


def test_the_order_is_fixed():
    """Numbers of the generator, not of a library's shuffle: a run resumed years later goes on where it was."""
    order = Order(np.arange(100_000), rows_per_shard=1024, seed=7)
    assert rows_of_step(order, 123, 4).tolist() == GOLDEN


GOLDEN = [59337, 8950, 29742, 25712]
