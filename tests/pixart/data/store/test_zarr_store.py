import dataclasses
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import tensorstore
import zarr

from pixart.config.dataset import DataConfig
from pixart.data import manifest as manifests
from pixart.data.manifest import Manifest
from pixart.data.store import zarr_store as stores
from pixart.data.store.zarr_store import Store


@pytest.fixture
def manifest(tmp_path) -> Manifest:
    data = DataConfig(path=str(tmp_path), num_shards=3, max_images=10, max_text_tokens=5, store_text_embeddings=True)
    manifest = Manifest(
        data=data, images=10, rows_per_shard=4, class_names=("a",), latent_shape=(2, 3, 3), text_dim=6, models={}
    )
    stores.create(manifest)
    manifests.write(manifest)
    return manifest


def columns(manifest: Manifest, shard: int, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    start, stop = manifest.shard_range(shard)
    rows = stop - start
    values = {
        name: random.integers(0, 50, size=(rows, *shape)).astype(dtype)
        for name, (shape, dtype) in stores.layout(manifest).items()
    }
    return {**values, "valid": random.random(rows) < 0.7}


def test_rows_are_read_as_written_in_any_order(manifest):
    written = {shard: columns(manifest, shard, shard) for shard in (2, 0, 1)}
    for shard, values in written.items():
        stores.write_shard(manifest, shard, values)
    store = Store(manifest)
    rows = np.array([9, 0, 5, 4, 1])
    for name in stores.layout(manifest):
        expected = np.concatenate([written[shard][name] for shard in range(3)])
        assert (store.read(name, rows) == expected[rows]).all(), name
    valid = np.concatenate([written[shard]["valid"] for shard in range(3)])
    assert store.valid_rows().tolist() == np.flatnonzero(valid).tolist()


def test_zarr_libraries_read_the_store(manifest):
    """They also detect corrupted chunks, as the checksums are part of the format."""
    written = [columns(manifest, shard, shard) for shard in range(3)]
    for shard, values in enumerate(written):
        stores.write_shard(manifest, shard, values)
    root = Path(manifest.data.path) / "latents.zarr"
    for name in stores.layout(manifest):
        expected = np.concatenate([values[name] for values in written])
        assert (zarr.open_group(root, mode="r")[name][:10] == expected).all()
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{root}/{name}/"}}
        assert (tensorstore.open(spec).result()[:10].read().result() == expected).all()
    flip_bit(root / "latents/c/1/0/0/0", 40)
    spec["kvstore"]["path"] = f"{root}/latents/"
    with pytest.raises(ValueError, match="Digest mismatch"):
        tensorstore.open(spec).result()[4:8].read().result()


def flip_bit(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["latents", "label", "token_ids", "token_mask", "text_states"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: flip_bit(file, 3), "corrupted"),
        (lambda file: flip_bit(file, file.stat().st_size - 2), "corrupted"),
        (lambda file: os.truncate(file, file.stat().st_size - 1), "truncated"),
        (lambda file: os.truncate(file, 0), "truncated"),
        (lambda file: file.unlink(), "No such file"),
    ],
)
def test_damaged_files_are_errors(manifest, name, damage, words):
    for shard in range(3):
        stores.write_shard(manifest, shard, columns(manifest, shard, shard))
    store = Store(manifest)
    damage(Path(manifest.data.path) / store.columns[name].file(1))
    assert len(store.read(name, np.array([0, 1, 9]))) == 3
    with pytest.raises(ValueError, match=f"array {name}, shard 1: .*{words}"):
        store.read(name, np.array([0, 4, 9]))


def test_damaged_valid_array_is_an_error(manifest):
    stores.write_shard(manifest, 1, columns(manifest, 1, 0))
    store = Store(manifest)
    flip_bit(Path(manifest.data.path) / store.columns["valid"].file(1), 0)
    with pytest.raises(ValueError, match=r"array valid, shard 1: .*corrupted"):
        store.valid_rows()


def test_another_chunk_order_is_an_error(manifest):
    stores.write_shard(manifest, 0, columns(manifest, 0, 0))
    array = zarr.open_group(Path(manifest.data.path) / "latents.zarr", mode="r+")["latents"]
    array[:4] = np.stack([np.zeros((2, 3, 3)), *np.ones((3, 2, 3, 3))])  # zarr omits a chunk of zeros
    with pytest.raises(ValueError, match="array latents, shard 0: "):
        Store(manifest).read("latents", np.array([1, 2]))


def test_failed_writes_leave_no_files(manifest):
    stores.write_shard(manifest, 0, columns(manifest, 0, 0))
    with pytest.raises(ValueError, match="could not convert"):
        stores.write_shard(manifest, 1, {**columns(manifest, 1, 0), "text_states": np.full((4, 5, 6), "x")})
    with pytest.raises(OSError, match=r"No space left|File too large"), file_size_limit(100):
        stores.write_shard(manifest, 2, columns(manifest, 2, 0))
    assert not [file for file in Path(manifest.data.path).rglob(".*")]
    assert set(Store(manifest).valid_rows()) <= {0, 1, 2, 3}


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Limit the size of files, which has the effect of a full disk: a partial write, then an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_unwritten_and_incomplete_shards_are_invalid(manifest, monkeypatch):
    stores.write_shard(manifest, 1, {**columns(manifest, 1, 0), "valid": np.ones(4, bool)})
    assert Store(manifest).valid_rows().tolist() == [4, 5, 6, 7]
    broken = columns(manifest, 1, 1)
    broken["token_ids"] = broken["token_ids"][:2]
    with pytest.raises(ValueError, match="token_ids"):
        stores.write_shard(manifest, 1, broken)
    assert Store(manifest).valid_rows().tolist() == []  # the earlier content of the shard is invalid as well


def test_statistics_use_valid_rows_only(manifest):
    written = [columns(manifest, shard, shard) for shard in range(3)]
    for shard, values in enumerate(written):
        stores.write_shard(manifest, shard, values)
        stores.write_shard(manifest, shard, values)  # a retry must not be counted twice
    latents = np.concatenate([values["latents"][values["valid"]] for values in written]).astype(np.float64)
    mean, std = Store(manifest).statistics()
    assert np.allclose(mean, latents.mean((0, 2, 3)))
    assert np.allclose(std, latents.std((0, 2, 3)))
    scalar = dataclasses.replace(manifest, data=dataclasses.replace(manifest.data, normalization="scalar"))
    mean, std = Store(scalar).statistics()
    assert np.allclose(mean, [latents.mean()] * 2)
    assert np.allclose(std, [latents.std()] * 2)


def test_only_uncached_blocks_are_prefetched(manifest, monkeypatch):
    for shard in range(3):
        stores.write_shard(manifest, shard, columns(manifest, shard, shard))
    sizes_advised = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, size, advice: sizes_advised.append(size))
    Store(manifest).prefetch(["latents", "label"], np.arange(10), Event())
    if sizes_advised:
        pytest.skip("this file system does not support RWF_NOWAIT")

    def not_cached(*arguments):
        raise BlockingIOError

    monkeypatch.setattr(os, "preadv", not_cached)
    store = Store(manifest)
    store.prefetch(["latents", "label"], np.arange(10), Event())
    sizes = {name: store.columns[name].span(0, manifest.rows_per_shard)[1] for name in ("latents", "label")}
    assert sizes_advised == [sizes["latents"]] * 3 + [sizes["label"]] * 3


def test_missing_column_is_an_error(manifest):
    values = columns(manifest, 0, 0)
    del values["label"]
    with pytest.raises(ValueError, match="label"):
        stores.write_shard(manifest, 0, values)


def test_shard_ranges(manifest):
    assert [manifest.shard_range(shard) for shard in range(3)] == [(0, 4), (4, 8), (8, 10)]
    assert manifest.rows == 12
    with pytest.raises(ValueError, match="shards 0 to 2"):
        manifest.shard_range(3)


def test_shards_without_images_are_empty(manifest):
    many = dataclasses.replace(manifest, data=dataclasses.replace(manifest.data, num_shards=256), rows_per_shard=1)
    assert many.shard_range(9) == (9, 10)
    assert many.shard_range(255) == (10, 10)


def test_manifest_round_trip_and_hash(manifest, tmp_path):
    assert manifests.read(tmp_path) == manifest
    moved = dataclasses.replace(manifest, data=dataclasses.replace(manifest.data, path="/elsewhere"))
    assert moved.hash == manifest.hash
    other = dataclasses.replace(manifest, data=dataclasses.replace(manifest.data, image_size=512))
    assert other.hash != manifest.hash
    with pytest.raises(ValueError, match="is not a dataset"):
        manifests.read(tmp_path / "nowhere")


@pytest.mark.parametrize("gap", [1, 7, 1000])
def test_runs_of_rows_are_of_one_shard_and_as_long_as_a_system_call_allows(gap):
    """Without gaps the rows of a run are consecutive; with them, the span of a run is limited too."""
    random = np.random.default_rng(gap)
    for share in (0.02, 0.3, 1.0):
        rows = np.sort(random.choice(5000, int(5000 * share), replace=False))
        rows = np.repeat(rows, random.integers(1, 3, len(rows))) if gap > 1 else rows
        runs = list(stores.contiguous_runs(rows, 700, gap))
        assert [start for start, _ in runs] == [0, *(stop for _, stop in runs[:-1])]
        assert runs[-1][1] == len(rows)
        for start, stop in runs:
            run = rows[start:stop]
            assert 0 < len(run) <= stores.MAX_BUFFERS // 2
            assert run[-1] - run[0] < stores.MAX_BUFFERS // 2
            assert run[0] // 700 == run[-1] // 700
            assert np.diff(run).max(initial=0) <= gap
            if gap == 1:
                assert (np.diff(run) == 1).all()
