"""Arrays of latents in aspect buckets: files, validity, and reading by this module and by Zarr libraries."""

from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

from pixart.data.store import zarr_store as stores
from pixart.data.store.layout import BUCKET, LATENTS, VALID, latents_of
from pixart.data.store.zarr_store import Store
from tests.support.bucketed_store import bucketed_columns, bucketed_manifest, bucketed_store

BUCKETS = ((2, 8), (4, 4), (8, 2))


@pytest.fixture
def store(tmp_path) -> Store:
    return bucketed_store(str(tmp_path), BUCKETS, rows=150, num_shards=4)


def test_rows_of_a_bucket_are_read_in_any_order(store):
    valid, random = store.valid_rows(), np.random.default_rng(1)
    for bucket, name in enumerate(latents_of(store.manifest)):
        rows = random.permutation(valid[store.bucket_of(valid) == bucket])
        latents = store.read(LATENTS, rows)
        assert latents.shape == (len(rows), *store.manifest.latent_shapes[bucket])
        assert (latents == rows[:, None, None, None]).all()
        assert name == store.latents_column(rows)


def test_zarr_libraries_read_the_arrays(store):
    """They read zeros where a row is of another bucket or invalid."""
    root = Path(store.manifest.data.path) / "latents.zarr"
    valid, bucket = (zarr.open_group(root, mode="r")[name][:150] for name in (VALID, BUCKET))
    for index, name in enumerate(latents_of(store.manifest)):
        expected = np.where(valid & (bucket == index), np.arange(150), 0)
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{root}/{name}/"}}
        for values in (
            zarr.open_group(root, mode="r")[name][:150],
            tensorstore.open(spec).result()[:150].read().result(),
        ):
            assert values.shape == (150, *store.manifest.latent_shapes[index])
            assert (values == expected[:, None, None, None]).all()


def test_a_file_has_only_the_rows_of_its_bucket(store):
    """The bytes of all files are those of the valid rows, plus an index entry of 16 bytes for every row."""
    columns, manifest = store.columns, store.manifest
    rows = store.valid_rows()
    for index, name in enumerate(latents_of(manifest)):
        files = [Path(manifest.data.path) / columns[name].file(shard) for shard in range(4)]
        size = sum(file.stat().st_size for file in files if file.exists())
        count = int((store.bucket_of(rows) == index).sum())
        indices = sum(file.exists() for file in files) * (16 * manifest.rows_per_shard + 4)
        assert size == count * columns[name].stride + indices


def test_shards_are_read_as_they_were_written(tmp_path):
    manifest = bucketed_manifest(str(tmp_path), BUCKETS, rows=40, num_shards=2)
    bucket, valid = np.arange(20) % 3, np.arange(20) % 7 != 2
    written = [bucketed_columns(manifest, shard, bucket, valid) for shard in range(2)]
    for shard in range(2):
        stores.write_shard(manifest, shard, written[shard])
    for shard in range(2):
        values = Store(manifest).read_shard(shard)
        assert values.keys() == written[shard].keys()
        assert all((values[name] == written[shard][name]).all() for name in values)


def test_a_shard_written_again_replaces_all_buckets(tmp_path):
    """A bucket without rows has no file; rows of an unfinished shard are never valid."""
    manifest = bucketed_manifest(str(tmp_path), BUCKETS, rows=10, num_shards=1)
    every = np.ones(10, bool)
    stores.write_shard(manifest, 0, bucketed_columns(manifest, 0, np.zeros(10, int), every))
    stores.write_shard(manifest, 0, bucketed_columns(manifest, 0, np.full(10, 2), every))
    store = Store(manifest)
    files = [Path(manifest.data.path) / store.columns[name].file(0) for name in latents_of(manifest)]
    assert [file.exists() for file in files] == [False, False, True]
    assert store.latents_column(np.arange(10)) == "latents_8x2"
    (Path(manifest.data.path) / store.columns[VALID].file(0)).unlink()
    assert len(Store(manifest).valid_rows()) == 0


def test_statistics_are_of_all_buckets(store):
    valid = store.valid_rows()
    values = [
        store.read(LATENTS, valid[store.bucket_of(valid) == bucket]).astype(float).swapaxes(0, 1).reshape(2, -1)
        for bucket in range(3)
    ]
    mean, std = store.statistics()
    assert np.allclose(mean, np.concatenate(values, 1).mean(1))
    assert np.allclose(std, np.concatenate(values, 1).std(1))


def test_rows_without_latents_are_refused(store):
    valid = store.valid_rows()
    first = valid[store.bucket_of(valid) == store.bucket_of(valid)[0]]
    other = valid[store.bucket_of(valid) != store.bucket_of(valid)[0]]
    with pytest.raises(ValueError, match="latents of 2 aspect buckets cannot be read together"):
        store.read(LATENTS, np.array([first[0], other[0]]))
    invalid = np.setdiff1d(np.arange(150), valid)[:1]
    with pytest.raises(ValueError, match=f"row {invalid[0]} is not valid, and has no latents"):
        store.read(LATENTS, invalid)


@pytest.mark.parametrize("offset", [3, -2])
def test_damage_is_detected(store, offset):
    rows = store.valid_rows()
    name = store.latents_column(rows[:1])
    file = Path(store.manifest.data.path) / store.columns[name].file(0)
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=f"array {name}, shard 0"):
        store.read(LATENTS, rows[:1])


def test_latents_of_another_number_of_rows_are_refused(tmp_path):
    manifest = bucketed_manifest(str(tmp_path), BUCKETS, rows=10, num_shards=1)
    columns = bucketed_columns(manifest, 0, np.zeros(10, int), np.ones(10, bool))
    columns["latents_2x8"] = columns["latents_2x8"][1:]
    with pytest.raises(ValueError, match="latents_2x8 has shape"):
        stores.write_shard(manifest, 0, columns)
