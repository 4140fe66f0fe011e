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
    made = Manifest(
        data=data, images=10, rows_per_shard=4, class_names=("a",), latent_shape=(2, 3, 3), text_dim=6, models={}
    )
    stores.create(made)
    manifests.write(made)
    return made


def columns(manifest: Manifest, shard: int, seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    start, stop = manifest.shard(shard)
    rows = stop - start
    made = {
        name: random.integers(0, 50, size=(rows, *shape)).astype(dtype)
        for name, (shape, dtype) in stores.layout(manifest).items()
    }
    return {**made, "valid": random.random(rows) < 0.7}


def test_shards_read_back_whole_in_any_order(manifest):
    written = {shard: columns(manifest, shard, shard) for shard in (2, 0, 1)}
    for shard, values in written.items():
        stores.write_shard(manifest, shard, values)
    store = Store(manifest)
    rows = np.array([9, 0, 5, 4, 1])
    for name in stores.layout(manifest):
        whole = np.concatenate([written[shard][name] for shard in range(3)])
        assert (store.read(name, rows) == whole[rows]).all(), name
    valid = np.concatenate([written[shard]["valid"] for shard in range(3)])
    assert store.valid_rows().tolist() == np.flatnonzero(valid).tolist()


def test_any_library_for_zarr_reads_it(manifest):
    """And takes an altered chunk for one: our checksums are the format's."""
    written = [columns(manifest, shard, shard) for shard in range(3)]
    for shard, values in enumerate(written):
        stores.write_shard(manifest, shard, values)
    root = Path(manifest.data.path) / "latents.zarr"
    for name in stores.layout(manifest):
        whole = np.concatenate([values[name] for values in written])
        assert (zarr.open_group(root, mode="r")[name][:10] == whole).all()
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{root}/{name}/"}}
        assert (tensorstore.open(spec).result()[:10].read().result() == whole).all()
    alter(root / "latents/c/1/0/0/0", 40)
    spec["kvstore"]["path"] = f"{root}/latents/"
    with pytest.raises(ValueError, match="Digest mismatch"):
        tensorstore.open(spec).result()[4:8].read().result()


def alter(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["latents", "label", "token_ids", "token_mask", "text_states"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: alter(file, 3), "altered"),
        (lambda file: alter(file, file.stat().st_size - 2), "altered"),
        (lambda file: os.truncate(file, file.stat().st_size - 1), "cut off"),
        (lambda file: os.truncate(file, 0), "cut off"),
        (lambda file: file.unlink(), "No such file"),
    ],
)
def test_damaged_shards_are_never_read_as_data(manifest, name, damage, words):
    for shard in range(3):
        stores.write_shard(manifest, shard, columns(manifest, shard, shard))
    store = Store(manifest)
    damage(Path(manifest.data.path) / store.columns[name].file(1))
    assert len(store.read(name, np.array([0, 1, 9]))) == 3
    with pytest.raises(ValueError, match=f"array {name}, shard 1: .*{words}"):
        store.read(name, np.array([0, 4, 9]))


def test_damaged_marks_of_validity(manifest):
    stores.write_shard(manifest, 1, columns(manifest, 1, 0))
    store = Store(manifest)
    alter(Path(manifest.data.path) / store.columns["valid"].file(1), 0)
    with pytest.raises(ValueError, match=r"array valid, shard 1: .*altered"):
        store.valid_rows()


def test_shards_that_another_writer_has_laid_out(manifest):
    stores.write_shard(manifest, 0, columns(manifest, 0, 0))
    array = zarr.open_group(Path(manifest.data.path) / "latents.zarr", mode="r+")["latents"]
    array[:4] = np.stack([np.zeros((2, 3, 3)), *np.ones((3, 2, 3, 3))])  # a chunk of zeros is left out
    with pytest.raises(ValueError, match="array latents, shard 0: "):
        Store(manifest).read("latents", np.array([1, 2]))


def test_nothing_half_written_has_a_name(manifest):
    stores.write_shard(manifest, 0, columns(manifest, 0, 0))
    with pytest.raises(ValueError, match="could not convert"):
        stores.write_shard(manifest, 1, {**columns(manifest, 1, 0), "text_states": np.full((4, 5, 6), "x")})
    with pytest.raises(OSError, match=r"No space left|File too large"), file_size_limit(100):
        stores.write_shard(manifest, 2, columns(manifest, 2, 0))
    assert not [file for file in Path(manifest.data.path).rglob(".*") if file.is_file()]
    assert set(Store(manifest).valid_rows()) <= {0, 1, 2, 3}


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """What a full disk does to a write: a part of it, then an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_unwritten_and_half_written_shards_are_invalid(manifest, monkeypatch):
    stores.write_shard(manifest, 1, {**columns(manifest, 1, 0), "valid": np.ones(4, bool)})
    assert Store(manifest).valid_rows().tolist() == [4, 5, 6, 7]
    broken = columns(manifest, 1, 1)
    broken["token_ids"] = broken["token_ids"][:2]
    with pytest.raises(ValueError, match="token_ids"):
        stores.write_shard(manifest, 1, broken)
    assert Store(manifest).valid_rows().tolist() == []  # what it replaced is gone, and nothing is taken for data


def test_statistics_are_of_valid_rows_only(manifest):
    written = [columns(manifest, shard, shard) for shard in range(3)]
    for shard, values in enumerate(written):
        stores.write_shard(manifest, shard, values)
        stores.write_shard(manifest, shard, values)  # a retry must not count twice
    latents = np.concatenate([values["latents"][values["valid"]] for values in written]).astype(np.float64)
    mean, std = Store(manifest).statistics()
    assert np.allclose(mean, latents.mean((0, 2, 3)))
    assert np.allclose(std, latents.std((0, 2, 3)))
    scalar = dataclasses.replace(manifest, data=dataclasses.replace(manifest.data, normalization="scalar"))
    mean, std = Store(scalar).statistics()
    assert np.allclose(mean, [latents.mean()] * 2)
    assert np.allclose(std, [latents.std()] * 2)


def test_only_what_has_to_be_waited_for_is_asked_for_early(manifest, monkeypatch):
    for shard in range(3):
        stores.write_shard(manifest, shard, columns(manifest, shard, shard))
    asked = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, size, advice: asked.append(size))
    Store(manifest).prefetch(["latents", "label"], np.arange(10), Event())
    if asked:
        pytest.skip("this file system does not tell what is in memory")

    def away(*arguments):
        raise BlockingIOError

    monkeypatch.setattr(os, "preadv", away)
    store = Store(manifest)
    store.prefetch(["latents", "label"], np.arange(10), Event())
    sizes = {name: store.columns[name].span(0)[1] for name in ("latents", "label")}
    assert asked == [sizes["latents"]] * 3 + [sizes["label"]] * 3


def test_columns_must_be_complete(manifest):
    values = columns(manifest, 0, 0)
    del values["label"]
    with pytest.raises(ValueError, match="label"):
        stores.write_shard(manifest, 0, values)


def test_rows_keep_their_place(manifest):
    assert [manifest.shard(shard) for shard in range(3)] == [(0, 4), (4, 8), (8, 10)]
    assert manifest.rows == 12
    with pytest.raises(ValueError, match="shards 0 to 2"):
        manifest.shard(3)


def test_more_shards_than_images(manifest):
    many = dataclasses.replace(manifest, data=dataclasses.replace(manifest.data, num_shards=256), rows_per_shard=1)
    assert many.shard(9) == (9, 10)
    assert many.shard(255) == (10, 10)


def test_manifest_round_trip_and_hash(manifest, tmp_path):
    assert manifests.read(tmp_path) == manifest
    moved = dataclasses.replace(manifest, data=dataclasses.replace(manifest.data, path="/elsewhere"))
    assert moved.hash == manifest.hash
    other = dataclasses.replace(manifest, data=dataclasses.replace(manifest.data, image_size=512))
    assert other.hash != manifest.hash
    with pytest.raises(ValueError, match="no dataset"):
        manifests.read(tmp_path / "nowhere")
