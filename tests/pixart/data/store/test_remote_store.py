"""Datasets on S3, tested with an S3 server in a separate process."""

import contextlib
import dataclasses
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import s3fs

from pixart.config.dataset import DataConfig
from pixart.data import manifest as manifests
from pixart.data.loading.loader import Loader
from pixart.data.manifest import Manifest
from pixart.data.store import zarr_store as stores
from pixart.data.store.zarr_store import Store

pytestmark = pytest.mark.slow

URL = "s3://bucket/sets/dataset"


class Server:
    """A running S3 server."""

    def __init__(self, port: int, log: Path) -> None:
        self.endpoint, self.log = f"http://127.0.0.1:{port}", log

    def requests(self) -> int:
        """Return the number of requests answered so far."""
        return self.log.read_text().count("HTTP/1.1")


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    server = Server(port, log)
    for _ in range(200):
        try:
            urllib.request.urlopen(server.endpoint, timeout=1).close()
            break
        except OSError:
            time.sleep(0.1)
    yield server
    process.terminate()
    process.wait()


@pytest.fixture
def environment(server, tmp_path, monkeypatch) -> Server:
    variables = {
        "AWS_ENDPOINT_URL": server.endpoint,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "PIXART_CACHE": str(tmp_path / "cache"),
        "PIXART_CACHE_GB": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    return server


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Store:
    path = str(tmp_path_factory.mktemp("dataset"))
    data = DataConfig(path=path, num_shards=3, max_images=600, max_text_tokens=5)
    manifest = Manifest(
        data=data, images=600, rows_per_shard=201, class_names=("a",), latent_shape=(4, 32, 32), text_dim=6, models={}
    )
    stores.create(manifest)
    manifests.write(manifest)
    random = np.random.default_rng(0)
    for shard in range(2):  # the third shard is not written
        columns = {
            name: random.integers(0, 50, size=(201, *shape)).astype(dtype)
            for name, (shape, dtype) in stores.layout(manifest).items()
        }
        stores.write_shard(manifest, shard, {**columns, "valid": np.arange(201) % 7 != 0})
    return Store(manifest)


@pytest.fixture
def remote(environment, local) -> Store:
    upload(local)
    return Store(manifests.read(URL))


def upload(local: Store) -> None:
    system = s3fs.S3FileSystem()
    if not system.exists("bucket"):
        system.mkdir("bucket")
    if not system.exists(URL):
        system.put(local.manifest.data.path, URL, recursive=True)


def equal(first, second) -> bool:
    return all(
        np.array_equal(np.asarray(getattr(first, field.name)), np.asarray(getattr(second, field.name)))
        for field in dataclasses.fields(first)
        if getattr(first, field.name) is not None
    )


def test_remote_store_equals_the_local_store(remote, local):
    assert remote.manifest.hash == local.manifest.hash
    assert remote.manifest.data.path == URL
    assert (remote.valid_rows() == local.valid_rows()).all()
    assert remote.statistics() == local.statistics()
    local_batches, remote_batches = (
        Loader(store, global_batch_size=48, seed=0, cond_dropout_prob=0.5).iterate(0, 20) for store in (local, remote)
    )
    assert all(equal(*pair) for pair in zip(local_batches, remote_batches, strict=True))


def test_later_epochs_are_served_from_the_cache(remote, environment):
    loader = Loader(remote, global_batch_size=43, seed=0)
    steps = len(loader.order.samplers[0].valid) // 43
    assert len(loader.order.samplers[0].valid) == 43 * steps
    list(loader.iterate(0, steps))
    before = environment.requests()
    assert before > steps
    list(loader.iterate(steps, 3 * steps))
    assert environment.requests() == before
    other = Loader(Store(manifests.read(URL)), global_batch_size=43, seed=1)  # a new store uses the same cache
    started = environment.requests()
    list(other.iterate(0, steps))
    assert environment.requests() == started


def epoch(rank: int) -> int:
    loader = Loader(Store(manifests.read(URL)), global_batch_size=42, seed=0, rank=rank, world_size=2)
    return sum(int(batch.label.sum()) for batch in loader.iterate(0, 8))


@pytest.mark.slow
def test_processes_share_the_cache(remote, environment, local):
    """Segments that two ranks need at the same time are fetched once."""
    expected = [
        sum(
            int(batch.label.sum())
            for batch in Loader(local, global_batch_size=42, seed=0, rank=rank, world_size=2).iterate(0, 8)
        )
        for rank in range(2)
    ]
    log_start = len(environment.log.read_text())
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        assert list(pool.map(epoch, range(2))) == expected
    requests = re.findall(
        r"GET /bucket/sets/dataset/(latents\.zarr/\w+/c/\S*) HTTP", environment.log.read_text()[log_start:]
    )
    segments = [name for name in requests if "/valid/" not in name]
    assert len(segments) == len(Store(remote.manifest).storage.cache)


def test_cache_size_is_limited(environment, local, monkeypatch, tmp_path):
    monkeypatch.setenv("PIXART_CACHE_GB", "0.002")
    upload(local)
    store = Store(manifests.read(URL))
    assert sum(column.segment_size for column in store.columns.values()) > 2e6
    loader = Loader(store, global_batch_size=48, seed=0)
    for expected, batch in zip(
        Loader(local, global_batch_size=48, seed=0).iterate(0, 30), loader.iterate(0, 30), strict=True
    ):
        assert equal(expected, batch)
    before = environment.requests()
    for _ in range(100):  # prefetching may still be in progress
        cached = cached_bytes(tmp_path / "cache")
        if cached <= 2e6:
            break
        time.sleep(0.1)
    assert 0 < cached <= 2e6  # segments are evicted ten at a time
    list(Loader(store, global_batch_size=48, seed=0).iterate(0, 10))
    assert environment.requests() > before  # evicted segments are fetched again


def cached_bytes(folder: Path) -> int:
    """Return the size of the values of a cache, from which files may be evicted meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += Path(parent, name).stat().st_size if name.endswith(".val") else 0
    return total


def test_damaged_cache_is_refetched(remote, local, tmp_path):
    rows = local.valid_rows()
    assert (remote.read("latents", rows) == local.read("latents", rows)).all()
    for file in (tmp_path / "cache").rglob("*.val"):
        file.write_bytes(bytes(file.stat().st_size))
    again = Store(remote.manifest)
    assert (again.read("latents", rows) == local.read("latents", rows)).all()


def test_damaged_remote_files_are_errors(environment, local, tmp_path):
    upload(local)
    system, url = s3fs.S3FileSystem(), "s3://bucket/damaged"
    copy = shutil.copytree(local.manifest.data.path, tmp_path / "copy")
    (copy / local.columns["latents"].file(1)).write_bytes(b"x" * 5000)
    (copy / local.columns["label"].file(0)).unlink()
    system.put(str(copy), url, recursive=True)
    store = Store(manifests.read(url))
    with pytest.raises(ValueError, match=r"array latents, shard 1: .* is truncated"):
        store.read("latents", np.array([202]))
    with pytest.raises(ValueError, match=r"array label, shard 0: .* cannot be read"):
        store.read("label", np.array([3]))


def test_missing_datasets_are_errors(environment, local):
    upload(local)
    for url in ("s3://bucket/nothing", "s3://no-such-bucket/dataset"):
        start = time.perf_counter()
        with pytest.raises(ValueError, match="is not a dataset") as caught:
            manifests.read(url)
        assert time.perf_counter() - start < 5
        assert "\n" not in str(caught.value)


def test_server_without_response_is_an_error(environment, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    start = time.perf_counter()
    with pytest.raises(
        ValueError, match=r"dataset s3://bucket/sets/dataset cannot be read: .*127\.0\.0\.1:9"
    ) as caught:
        manifests.read(URL)
    assert time.perf_counter() - start < 10
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["much", "0", "-3", "inf"])
def test_invalid_cache_size_is_an_error(remote, monkeypatch, text):
    monkeypatch.setenv("PIXART_CACHE_GB", text)
    with pytest.raises(ValueError, match="PIXART_CACHE_GB"):
        Store(remote.manifest)


def test_unknown_protocol_is_an_error():
    with pytest.raises(ValueError, match="dataset nowhere://x cannot be read: "):
        manifests.read("nowhere://x")


@pytest.mark.slow
def test_training_from_a_url_equals_training_from_a_folder(environment, local, small_recipe, tmp_path):
    from pixart.checkpoint import directory
    from pixart.training.loop import train

    upload(local)
    s3fs.S3FileSystem().put(small_recipe.data.path, "s3://bucket/small", recursive=True)
    saved = [
        directory.load(
            train(stage=1, model=small_recipe.model, config=small_recipe.stage1, dataset=dataset, run=tmp_path / name)
        )
        for name, dataset in (("local", small_recipe.data.path), ("remote", "s3://bucket/small"))
    ]
    assert saved[1].dataset == "s3://bucket/small"
    assert all((saved[1].model[name] == value).all() for name, value in saved[0].model.items())
