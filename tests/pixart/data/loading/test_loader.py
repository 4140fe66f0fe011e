import dataclasses
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from pixart.config.dataset import DataConfig
from pixart.data import manifest as manifests
from pixart.data.loading.loader import Batch, Loader
from pixart.data.manifest import Manifest
from pixart.data.store import zarr_store as stores
from pixart.data.store.zarr_store import Store


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Store:
    """200 rows in 7 shards with long and short captions; what a row has says which it is."""
    path = str(tmp_path_factory.mktemp("dataset"))
    data = DataConfig(
        path=path, num_shards=7, max_images=200, max_text_tokens=5, store_text_embeddings=True, short_captions=True
    )
    made = Manifest(
        data=data, images=200, rows_per_shard=29, class_names=("a",), latent_shape=(2, 3, 3), text_dim=6, models={}
    )
    stores.create(made)
    manifests.write(made)
    for shard in range(7):
        rows = np.arange(*made.shard(shard))
        values = {
            name: np.broadcast_to(
                (rows + 1000 * name.startswith("short_")).reshape(-1, *[1] * len(shape)), (len(rows), *shape)
            )
            for name, (shape, _) in stores.layout(made).items()
        }
        stores.write_shard(made, shard, {**values, "valid": rows % 10 != 3})
    return Store(made)


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {
        field.name: torch.as_tensor(getattr(batch, field.name))
        for field in dataclasses.fields(batch)
        if getattr(batch, field.name) is not None
    }


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_share_the_global_batch(dataset, world):
    settings = {"batch": 16, "seed": 4, "drop": 0.3, "short": 0.4}
    ranks = [Loader(dataset, **settings, rank=rank, world=world) for rank in range(world)]
    alone = Loader(dataset, **settings)
    for step in (0, 11, 12, 40):  # 180 valid rows: step 11 reaches into the next epoch
        whole, parts = tensors(alone.read(step)), [tensors(rank.read(step)) for rank in ranks]
        for name, values in whole.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), values), name


def test_ranks_must_divide_the_batch(dataset):
    with pytest.raises(ValueError, match="3 ranks"):
        Loader(dataset, batch=8, seed=0, world=3)


def test_what_a_batch_holds(dataset):
    loader = Loader(dataset, batch=60, seed=0, drop=0.25, short=0.5)
    dropped = short = 0
    for batch in loader.iterate(0, 30):
        chosen = batch.rows + 1000 * (batch.token_ids[:, 0].numpy() >= 1000)
        assert (batch.rows % 10 != 3).all()
        assert (batch.label.numpy() == batch.rows).all()
        assert (batch.latents.numpy() == batch.rows[:, None, None, None]).all()
        assert (batch.token_ids.numpy() == chosen[:, None]).all()
        assert batch.text_states is not None
        assert (batch.text_states.numpy() == chosen[:, None, None].astype(np.float16)).all()
        dropped, short = dropped + int(batch.dropped.sum()), short + int((chosen >= 1000).sum())
    assert abs(dropped / 1800 - 0.25) < 0.04
    assert abs(short / 1800 - 0.5) < 0.04


def test_draws_are_not_of_each_other(dataset):
    """The same share of drops and of short captions falls on other rows, and others in each step."""
    loader = Loader(dataset, batch=160, seed=0, drop=0.5, short=0.5)
    first, second = loader.read(0), loader.read(1)
    assert 0.3 < float((first.dropped == (first.token_ids[:, 0] >= 1000)).float().mean()) < 0.7
    assert 0.3 < float((first.dropped == second.dropped).float().mean()) < 0.7


def test_short_captions_must_be_there(small_recipe):
    store = Store(manifests.read(small_recipe.data.path))
    with pytest.raises(ValueError, match=r"short_caption_prob=0\.1.*data\.short_captions"):
        Loader(store, batch=8, seed=0, short=0.1)


def test_states_are_left_where_nobody_reads_them(dataset):
    assert Loader(dataset, batch=8, seed=0, states=False).read(0).text_states is None


@pytest.mark.parametrize("start", [0, 3, 11, 100])
def test_reading_ahead_changes_nothing(dataset, start):
    loader, other = (Loader(dataset, batch=48, seed=0, drop=0.5, short=0.5) for _ in range(2))
    for step, batch in zip(range(start, start + 9), loader.iterate(start, start + 9), strict=True):
        wanted = tensors(other.read(step))
        assert all(torch.equal(values, wanted[name]) for name, values in tensors(batch).items())
    assert list(loader.iterate(4, 4)) == []


def test_an_error_of_the_reading_thread_reaches_the_caller(dataset, tmp_path):
    copy = dataclasses.replace(dataset.manifest.data, path=str(tmp_path / "copy"))
    shutil.copytree(dataset.manifest.data.path, copy.path)
    store = Store(dataclasses.replace(dataset.manifest, data=copy))
    loader = Loader(store, batch=8, seed=0)
    (tmp_path / "copy" / store.columns["latents"].file(5)).unlink()
    with pytest.raises(ValueError, match="array latents, shard 5"):
        list(loader.iterate(0, 25))


@pytest.mark.slow
def test_memory_stays_as_it_is(tmp_path):
    """Twelve epochs of two windows of 100 MB: how many are held at a time varies by one, and does not grow."""
    path, rows = str(tmp_path), 24_000
    data = DataConfig(path=path, num_shards=6, max_images=rows, max_text_tokens=8)
    made = Manifest(
        data=data, images=rows, rows_per_shard=4000, class_names=("a",), latent_shape=(4, 32, 32), text_dim=6, models={}
    )
    stores.create(made)
    manifests.write(made)
    columns = {name: np.zeros((4000, *shape), dtype) for name, (shape, dtype) in stores.layout(made).items()}
    for shard in range(6):
        stores.write_shard(made, shard, {**columns, "valid": np.ones(4000, bool)})
    loader, held = Loader(Store(made), batch=200, seed=0), []
    for step, _ in enumerate(loader.iterate(0, 1440)):
        if step % 120 == 119:
            held.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert max(held[6:]) - max(held[:6]) < 130e6
