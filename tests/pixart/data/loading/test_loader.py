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
    """200 rows in 7 shards with long and short captions. All values of a row are its index, plus 1000 if short."""
    path = str(tmp_path_factory.mktemp("dataset"))
    data = DataConfig(
        path=path, num_shards=7, max_images=200, max_text_tokens=5, store_text_embeddings=True, short_captions=True
    )
    manifest = Manifest(
        data=data, images=200, rows_per_shard=29, class_names=("a",), latent_shape=(2, 3, 3), text_dim=6, models={}
    )
    stores.create(manifest)
    manifests.write(manifest)
    for shard in range(7):
        rows = np.arange(*manifest.shard_range(shard))
        values = {
            name: np.broadcast_to(
                (rows + 1000 * name.startswith("short_")).reshape(-1, *[1] * len(shape)), (len(rows), *shape)
            )
            for name, (shape, _) in stores.layout(manifest).items()
        }
        stores.write_shard(manifest, shard, {**values, "valid": rows % 10 != 3})
    return Store(manifest)


def tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {
        field.name: torch.as_tensor(getattr(batch, field.name))
        for field in dataclasses.fields(batch)
        if getattr(batch, field.name) is not None
    }


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_load_slices_of_the_same_global_batch(dataset, world_size):
    settings = {"global_batch_size": 16, "seed": 4, "cond_dropout_prob": 0.3, "short_caption_prob": 0.4}
    ranks = [Loader(dataset, **settings, rank=rank, world_size=world_size) for rank in range(world_size)]
    single = Loader(dataset, **settings)
    for step in (0, 11, 12, 40):  # 180 valid rows: step 11 extends into the next epoch
        expected, parts = tensors(single.read(step)), [tensors(rank.read(step)) for rank in ranks]
        for name, values in expected.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), values), name


def test_global_batch_size_must_be_a_multiple_of_the_ranks(dataset):
    with pytest.raises(ValueError, match="must be a multiple of the 3 ranks"):
        Loader(dataset, global_batch_size=8, seed=0, world_size=3)


def test_contents_of_batches(dataset):
    loader = Loader(dataset, global_batch_size=60, seed=0, cond_dropout_prob=0.25, short_caption_prob=0.5)
    dropped = short = 0
    for batch in loader.iterate(0, 30):
        expected = batch.rows + 1000 * (batch.token_ids[:, 0].numpy() >= 1000)
        assert (batch.rows % 10 != 3).all()
        assert (batch.label.numpy() == batch.rows).all()
        assert (batch.latents.numpy() == batch.rows[:, None, None, None]).all()
        assert (batch.token_ids.numpy() == expected[:, None]).all()
        assert batch.text_states is not None
        assert (batch.text_states.numpy() == expected[:, None, None].astype(np.float16)).all()
        dropped, short = dropped + int(batch.dropped.sum()), short + int((expected >= 1000).sum())
    assert abs(dropped / 1800 - 0.25) < 0.04
    assert abs(short / 1800 - 0.5) < 0.04


def test_random_choices_are_independent(dataset):
    """Dropout and short captions affect different rows, and different ones in each step."""
    loader = Loader(dataset, global_batch_size=160, seed=0, cond_dropout_prob=0.5, short_caption_prob=0.5)
    first, second = loader.read(0), loader.read(1)
    assert 0.3 < float((first.dropped == (first.token_ids[:, 0] >= 1000)).float().mean()) < 0.7
    assert 0.3 < float((first.dropped == second.dropped).float().mean()) < 0.7


def test_missing_short_captions_are_an_error(small_recipe):
    store = Store(manifests.read(small_recipe.data.path))
    with pytest.raises(ValueError, match=r"short_caption_prob=0\.1.*data\.short_captions"):
        Loader(store, global_batch_size=8, seed=0, short_caption_prob=0.1)


def test_text_embeddings_are_optional(dataset):
    assert Loader(dataset, global_batch_size=8, seed=0, text_embeddings=False).read(0).text_states is None


@pytest.mark.parametrize("start", [0, 3, 11, 100])
def test_prefetching_does_not_change_batches(dataset, start):
    loader, other = (
        Loader(dataset, global_batch_size=48, seed=0, cond_dropout_prob=0.5, short_caption_prob=0.5) for _ in range(2)
    )
    for step, batch in zip(range(start, start + 9), loader.iterate(start, start + 9), strict=True):
        expected = tensors(other.read(step))
        assert all(torch.equal(values, expected[name]) for name, values in tensors(batch).items())
    assert list(loader.iterate(4, 4)) == []


def test_exceptions_of_reader_threads_are_raised(dataset, tmp_path):
    copy = dataclasses.replace(dataset.manifest.data, path=str(tmp_path / "copy"))
    shutil.copytree(dataset.manifest.data.path, copy.path)
    store = Store(dataclasses.replace(dataset.manifest, data=copy))
    loader = Loader(store, global_batch_size=8, seed=0)
    (tmp_path / "copy" / store.columns["latents"].file(5)).unlink()
    with pytest.raises(ValueError, match="array latents, shard 5"):
        list(loader.iterate(0, 25))


@pytest.mark.slow
def test_memory_does_not_grow(tmp_path):
    """Over twelve epochs of windows of 100 MB, the number of windows in memory varies by one."""
    path, rows = str(tmp_path), 24_000
    data = DataConfig(path=path, num_shards=6, max_images=rows, max_text_tokens=8)
    manifest = Manifest(
        data=data, images=rows, rows_per_shard=4000, class_names=("a",), latent_shape=(4, 32, 32), text_dim=6, models={}
    )
    stores.create(manifest)
    manifests.write(manifest)
    columns = {name: np.zeros((4000, *shape), dtype) for name, (shape, dtype) in stores.layout(manifest).items()}
    for shard in range(6):
        stores.write_shard(manifest, shard, {**columns, "valid": np.ones(4000, bool)})
    loader, resident = Loader(Store(manifest), global_batch_size=200, seed=0), []
    for step, _ in enumerate(loader.iterate(0, 1440)):
        if step % 120 == 119:
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert max(resident[6:]) - max(resident[:6]) < 130e6
