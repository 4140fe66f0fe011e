"""The order of training in aspect buckets: over random mixes of buckets, ranks and steps."""

import dataclasses
import hashlib

import numpy as np
import pytest
import torch

from pixart.data.loading.loader import Loader
from pixart.data.loading.order import TrainingOrder, training_order
from pixart.data.loading.sampler import WindowShuffleSampler
from tests.support.bucketed_store import bucketed_store

BUCKETS = ((2, 8), (4, 4), (8, 2), (3, 5), (5, 3), (1, 16))


def random_order(seed: int) -> tuple[TrainingOrder, list[np.ndarray]]:
    """Return an order of up to 12 buckets of 1 to 900 rows, and the rows of each bucket."""
    random = np.random.default_rng(seed)
    sizes = np.exp(random.uniform(0, np.log(900), random.integers(2, 13))).astype(int)
    bucket = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    rows = [np.flatnonzero(bucket == index) for index in range(len(sizes))]
    samplers = [
        WindowShuffleSampler(part, rows_per_shard=64, seed=seed, bucket=index, window=128)
        for index, part in enumerate(rows)
    ]
    return TrainingOrder(samplers, global_batch_size=int(random.integers(1, 65)), seed=seed), rows


@pytest.mark.parametrize("seed", range(12))
def test_batches_are_of_one_bucket_and_epochs_have_all_rows_once(seed):
    """After E epochs every row was sampled E times, but for a rest of less than one batch per bucket."""
    order, rows = random_order(seed)
    size, total = order.global_batch_size, sum(map(len, rows))
    epochs, step = 4, 0
    counts = np.zeros(total, int)
    bucket_of = np.empty(total, int)
    for index, part in enumerate(rows):
        bucket_of[part] = index
    batches = sum(epochs * len(part) // size for part in rows)
    taken = np.zeros(len(rows), int)
    for step in range(batches):
        index, start = order.batch(step)
        assert start == taken[index] * size  # the batches of a bucket follow each other
        taken[index] += 1
        batch = order.rows(step)
        assert len(batch) == size
        assert set(bucket_of[batch]) == {index}
        np.add.at(counts, batch, 1)
    for part in rows:
        assert epochs * len(part) - counts[part].sum() < size
        assert counts[part].max() - counts[part].min() <= 1


@pytest.mark.parametrize("seed", range(4))
def test_any_step_is_known_without_the_earlier_ones(seed):
    """A fresh order returns the same rows, and reads none of the earlier steps, also far into training."""
    order, _ = random_order(seed)
    expected = [order.rows(step) for step in range(100)]
    for step in np.random.default_rng(seed).permutation(100)[:20].tolist():
        assert (random_order(seed)[0].rows(step) == expected[step]).all()
    later, calls = random_order(seed)[0], 0
    shuffle = later._epoch_batches

    def count(epoch):
        nonlocal calls
        calls += 1
        return shuffle(epoch)

    later._epoch_batches = count
    later.rows(10**9)
    assert calls == 1


def test_buckets_are_mixed_within_an_epoch():
    """The batches of a bucket are spread over the epoch, in proportion to its rows."""
    rows = np.arange(4096)
    samplers = [
        WindowShuffleSampler(part, rows_per_shard=64, seed=0, bucket=index)
        for index, part in enumerate((rows[:1024], rows[1024:]))
    ]
    order = TrainingOrder(samplers, global_batch_size=8, seed=0)
    first = np.array([order.batch(step)[0] == 0 for step in range(512)])
    assert first.sum() == 128
    assert np.abs(first.reshape(4, 128).sum(1) - 32).max() < 20
    assert (first != [order.batch(512 + step)[0] == 0 for step in range(512)]).any()


@pytest.mark.parametrize("seed", range(3))
def test_ranks_load_slices_of_the_same_global_batch(tmp_path, seed):
    store = bucketed_store(str(tmp_path), BUCKETS, rows=600, num_shards=5, seed=seed)
    settings = {"global_batch_size": 16, "seed": seed, "cond_dropout_prob": 0.3}
    counts = np.unique(store.bucket_of(store.valid_rows()), return_counts=True)[1]
    worlds = [world for world in (1, 2, 4, 8) if world <= counts.min()]
    single = Loader(store, **settings)
    loaders = {
        world: [Loader(store, **settings, rank=rank, world_size=world) for rank in range(world)] for world in worlds
    }
    for step in (0, 1, 17, 45, 46, 200):
        expected = single.read(step)
        assert (expected.rows == single.order.rows(step)).all()
        assert (expected.latents.numpy() == expected.rows[:, None, None, None]).all()
        assert expected.latents.shape[1:] in store.manifest.latent_shapes
        for ranks in loaders.values():
            parts = [rank.read(step) for rank in ranks]
            for name in ("latents", "label", "dropped", "token_ids"):
                assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(expected, name))
            assert (np.concatenate([part.rows for part in parts]) == expected.rows).all()


@pytest.mark.parametrize("start", [0, 7, 90])
def test_resumed_loading_has_the_same_batches(tmp_path, start):
    store = bucketed_store(str(tmp_path), BUCKETS[:3], rows=500, num_shards=3)
    loader, other = (Loader(store, global_batch_size=12, seed=1) for _ in range(2))
    for step, batch in zip(range(start, start + 20), loader.iterate(start, start + 20), strict=True):
        assert torch.equal(batch.latents, other.read(step).latents)


def test_an_epoch_of_the_loader_has_all_valid_rows_once(tmp_path):
    store = bucketed_store(str(tmp_path), BUCKETS, rows=640, num_shards=4, seed=3)
    valid = store.valid_rows()
    sizes = np.unique(store.bucket_of(valid), return_counts=True)[1]
    loader = Loader(store, global_batch_size=1, seed=0)
    sampled = np.concatenate([batch.rows for batch in loader.iterate(0, len(valid))])
    assert (np.sort(sampled) == valid).all()
    assert sizes.sum() == len(valid)


def test_more_ranks_than_rows_of_a_bucket_are_refused(tmp_path):
    store = bucketed_store(str(tmp_path), BUCKETS, rows=60, num_shards=2, seed=3)
    smallest = np.unique(store.bucket_of(store.valid_rows()), return_counts=True)[1].min()
    world_size = 2 ** int(np.ceil(np.log2(smallest + 1)))
    with pytest.raises(ValueError, match=rf"its aspect bucket \d+x\d+ has {smallest} rows for {world_size} ranks"):
        Loader(store, global_batch_size=world_size, seed=0, world_size=world_size)


def test_a_dataset_without_buckets_has_its_order_of_before(tmp_path):
    """The rows, and the bytes of all files, are those of datasets from before aspect buckets existed."""
    store = bucketed_store(str(tmp_path), (), rows=300, num_shards=3, invalid=0)
    order = training_order(store, store.valid_rows(), global_batch_size=8, seed=7)
    sampler = WindowShuffleSampler(np.arange(300), rows_per_shard=100, seed=7)
    for step in (0, 5, 36, 37, 38, 1000):
        assert (order.rows(step) == sampler.rows(8 * step, 8 * step + 8)).all()
    assert order.rows(1000).tolist() == GOLDEN_ROWS
    files = sorted(path for path in (tmp_path / "latents.zarr").rglob("*") if path.is_file())
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files if "c" in file.parts)).hexdigest()
    assert digest[:16] == GOLDEN_FILES
    assert dataclasses.replace(store.manifest, models={}).hash == GOLDEN_HASH


GOLDEN_ROWS = [244, 211, 83, 225, 187, 74, 97, 181]
GOLDEN_FILES = "052f562dc447f33f"
GOLDEN_HASH = "85952f9985d90529"
