"""A dataset behind S3's protocol, against a real server process."""

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

URL = "s3://bucket/sets/dataset"


class Server:
    def __init__(self, port: int, log: Path) -> None:
        self.endpoint, self.log = f"http://127.0.0.1:{port}", log

    def requests(self) -> int:
        """How many it has answered so far."""
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
    found = Server(port, log)
    for _ in range(200):
        try:
            urllib.request.urlopen(found.endpoint, timeout=1).close()
            break
        except OSError:
            time.sleep(0.1)
    yield found
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
    made = Manifest(
        data=data, images=600, rows_per_shard=201, class_names=("a",), latent_shape=(4, 32, 32), text_dim=6, models={}
    )
    stores.create(made)
    manifests.write(made)
    random = np.random.default_rng(0)
    for shard in range(2):  # the third is not written yet
        columns = {
            name: random.integers(0, 50, size=(201, *shape)).astype(dtype)
            for name, (shape, dtype) in stores.layout(made).items()
        }
        stores.write_shard(made, shard, {**columns, "valid": np.arange(201) % 7 != 0})
    return Store(made)


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


def test_reads_what_the_local_one_reads(remote, local):
    assert remote.manifest.hash == local.manifest.hash
    assert remote.manifest.data.path == URL
    assert (remote.valid_rows() == local.valid_rows()).all()
    assert remote.statistics() == local.statistics()
    here, there = (Loader(store, batch=48, seed=0, drop=0.5).iterate(0, 20) for store in (local, remote))
    assert all(equal(*pair) for pair in zip(here, there, strict=True))


def test_second_epoch_asks_no_server(remote, environment):
    loader = Loader(remote, batch=43, seed=0)
    steps = len(loader.order.valid) // 43
    assert len(loader.order.valid) == 43 * steps
    list(loader.iterate(0, steps))
    before = environment.requests()
    assert before > steps
    list(loader.iterate(steps, 3 * steps))
    assert environment.requests() == before
    other = Loader(Store(manifests.read(URL)), batch=43, seed=1)  # another process finds the same cache
    started = environment.requests()
    list(other.iterate(0, steps))
    assert environment.requests() == started


def epoch(rank: int) -> int:
    loader = Loader(Store(manifests.read(URL)), batch=42, seed=0, rank=rank, world=2)
    return sum(int(batch.label.sum()) for batch in loader.iterate(0, 8))


@pytest.mark.slow
def test_processes_share_the_cache(remote, environment, local):
    """What two ranks ask for at the same time is fetched once."""
    expected = [
        sum(int(batch.label.sum()) for batch in Loader(local, batch=42, seed=0, rank=rank, world=2).iterate(0, 8))
        for rank in range(2)
    ]
    begun = len(environment.log.read_text())
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        assert list(pool.map(epoch, range(2))) == expected
    answers = re.findall(
        r"GET /bucket/sets/dataset/(latents\.zarr/\w+/c/\S*) HTTP", environment.log.read_text()[begun:]
    )
    pieces = [name for name in answers if "/valid/" not in name]
    assert len(pieces) == len(Store(remote.manifest).files.cache)


def test_the_cache_keeps_its_limit(environment, local, monkeypatch, tmp_path):
    monkeypatch.setenv("PIXART_CACHE_GB", "0.002")
    upload(local)
    store = Store(manifests.read(URL))
    assert sum(column.piece for column in store.columns.values()) > 2e6
    loader = Loader(store, batch=48, seed=0)
    for here, there in zip(Loader(local, batch=48, seed=0).iterate(0, 30), loader.iterate(0, 30), strict=True):
        assert equal(here, there)
    before = environment.requests()
    for _ in range(100):  # what is fetched ahead of time may still be under way
        held = bytes_below(tmp_path / "cache")
        if held <= 2e6:
            break
        time.sleep(0.1)
    assert 0 < held <= 2e6  # ten pieces go at a time
    list(Loader(store, batch=48, seed=0).iterate(0, 10))
    assert environment.requests() > before  # what had to go is fetched again


def bytes_below(folder: Path) -> int:
    """Of the values of a cache from which files and folders go meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += Path(parent, name).stat().st_size if name.endswith(".val") else 0
    return total


def test_a_cache_that_was_damaged_is_fetched_anew(remote, local, tmp_path):
    rows = local.valid_rows()
    assert (remote.read("latents", rows) == local.read("latents", rows)).all()
    for file in (tmp_path / "cache").rglob("*.val"):
        file.write_bytes(bytes(file.stat().st_size))
    again = Store(remote.manifest)
    assert (again.read("latents", rows) == local.read("latents", rows)).all()


def test_objects_that_were_damaged(environment, local, tmp_path):
    upload(local)
    system, url = s3fs.S3FileSystem(), "s3://bucket/damaged"
    copy = shutil.copytree(local.manifest.data.path, tmp_path / "copy")
    (copy / local.columns["latents"].file(1)).write_bytes(b"x" * 5000)
    (copy / local.columns["label"].file(0)).unlink()
    system.put(str(copy), url, recursive=True)
    store = Store(manifests.read(url))
    with pytest.raises(ValueError, match=r"array latents, shard 1: .* is cut off"):
        store.read("latents", np.array([202]))
    with pytest.raises(ValueError, match=r"array label, shard 0: .* cannot be read"):
        store.read("label", np.array([3]))


def test_what_is_not_there(environment, local):
    upload(local)
    for url in ("s3://bucket/nothing", "s3://no-such-bucket/dataset"):
        begun = time.perf_counter()
        with pytest.raises(ValueError, match="is no dataset") as found:
            manifests.read(url)
        assert time.perf_counter() - begun < 5
        assert "\n" not in str(found.value)


def test_a_server_that_does_not_answer(environment, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    s3fs.S3FileSystem.clear_instance_cache()
    begun = time.perf_counter()
    with pytest.raises(ValueError, match=r"dataset s3://bucket/sets/dataset cannot be read: .*127\.0\.0\.1:9") as found:
        manifests.read(URL)
    assert time.perf_counter() - begun < 10
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("text", ["much", "0", "-3", "inf"])
def test_limits_that_are_none(remote, monkeypatch, text):
    monkeypatch.setenv("PIXART_CACHE_GB", text)
    with pytest.raises(ValueError, match="PIXART_CACHE_GB"):
        Store(remote.manifest)


def test_protocols_that_are_none():
    with pytest.raises(ValueError, match="dataset nowhere://x cannot be read: "):
        manifests.read("nowhere://x")


@pytest.mark.slow
def test_training_from_a_url_is_training_from_a_folder(environment, local, small_recipe, tmp_path):
    from pixart.checkpoint import directory
    from pixart.training.loop import train

    upload(local)
    s3fs.S3FileSystem().put(small_recipe.data.path, "s3://bucket/small", recursive=True)
    saved = [
        directory.load(
            train(stage=1, model=small_recipe.model, config=small_recipe.stage1, dataset=dataset, run=tmp_path / name)
        )
        for name, dataset in (("here", small_recipe.data.path), ("there", "s3://bucket/small"))
    ]
    assert saved[1].dataset == "s3://bucket/small"
    assert all((saved[1].model[name] == value).all() for name, value in saved[0].model.items())
