import numpy as np
import pytest

from pixart.data import manifest as manifests
from pixart.data.loader import Loader, rows_of_step
from pixart.data.store import Store


def test_every_row_once_an_epoch_in_another_order():
    valid = np.array([3, 5, 8, 9, 20, 21, 22])
    drawn = np.concatenate([rows_of_step(valid, step, 4, seed=1) for step in range(7)])  # 28 = 4 epochs of 7
    epochs = drawn.reshape(4, 7)
    assert (np.sort(epochs, axis=1) == valid).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert (rows_of_step(valid, 3, 4, seed=1) == drawn[12:16]).all()
    assert (rows_of_step(valid, 0, 7, seed=2) != epochs[0]).any()


def test_batch_larger_than_the_dataset():
    drawn = rows_of_step(np.arange(3), 0, 9, seed=0).reshape(3, 3)
    assert (np.sort(drawn, axis=1) == np.arange(3)).all()


def test_ranks_share_the_global_batch(small_recipe):
    store = Store(manifests.read(small_recipe.data.path))
    whole = Loader(store, batch=8, seed=0).read(5)
    parts = [Loader(store, batch=8, seed=0, rank=rank, world=4).read(5) for rank in range(4)]
    assert np.concatenate([part.rows for part in parts]).tolist() == whole.rows.tolist()
    assert all((part.latents == whole.latents[2 * i : 2 * i + 2]).all() for i, part in enumerate(parts))
    with pytest.raises(ValueError, match="3 ranks"):
        Loader(store, batch=8, seed=0, world=3)


def test_reading_ahead_changes_nothing(small_recipe):
    loader = Loader(Store(manifests.read(small_recipe.data.path)), batch=8, seed=0)
    batches = list(loader.iterate(2, 9))
    assert [batch.rows.tolist() for batch in batches] == [loader.read(step).rows.tolist() for step in range(2, 9)]
    assert list(loader.iterate(4, 4)) == []
