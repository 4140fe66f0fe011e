"""Faults of a dataset: a full disk, an unreachable source, and files changed by others."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.state import ledger
from jobs.tasks import caption
from pixart.data import manifest as manifests
from pixart.data.store.zarr_store import Store
from tests.support.environment import bare_environment

SMALL = {"data.max_images": 64, "data.num_shards": 4, "data.store_text_embeddings": "false"}


def launch(home: Path, *arguments: str, settings: dict | None = None, **variables: str):
    """Run a launcher command with settings and additional environment variables."""
    overrides = [word for key, value in (settings or {}).items() for word in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "jobs.launch", *arguments, "--home", str(home), *overrides]
    environment = {**bare_environment(), **variables}
    return subprocess.run(command, capture_output=True, text=True, cwd=home, env=environment)


@pytest.fixture
def small_disk(tmp_path):
    """File system of 2200 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2200k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to mount a small file system, as root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_full_disk(small_disk, tmp_path):
    """Shards that fit are complete and no others are read; with more space, `retry` writes the others."""
    dataset = small_disk / "data"
    settings = {**SMALL, "data.max_images": 1024, "data.path": dataset}
    assert launch(tmp_path, "caption", settings=settings).returncode == 0
    done = launch(tmp_path, "latents", settings=settings)
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "No space left on device" in line or "ENOSPC" in line]
    assert line.startswith("failed: latents shard")
    complete = ledger.shards(dataset, "latents")
    assert len(complete) < 4
    store = Store(manifests.read(dataset))
    assert {row // store.manifest.rows_per_shard for row in store.valid_rows()} == complete

    subprocess.run(["mount", "-o", "remount,size=40m", str(small_disk)], check=True)
    done = launch(tmp_path, "retry")
    assert done.returncode == 0, done.stderr
    assert ledger.shards(dataset, "latents") == {0, 1, 2, 3}
    assert len(Store(manifests.read(dataset)).valid_rows()) == 1024


@pytest.mark.slow
def test_unreachable_s3_source(tmp_path):
    pytest.importorskip("s3fs", reason="needs the extra s3")
    begun = time.monotonic()
    done = launch(
        tmp_path,
        "init",
        settings={"data.source": "s3://bucket/photos"},
        AWS_ENDPOINT_URL="http://127.0.0.1:9",
        AWS_ACCESS_KEY_ID="a",
        AWS_SECRET_ACCESS_KEY="b",
    )
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: source 's3://bucket/photos': ")
    assert "127.0.0.1:9" in line
    assert not (tmp_path / "datasets").exists()
    assert time.monotonic() - begun < 60


@pytest.mark.slow
def test_changed_manifest(tmp_path):
    assert launch(tmp_path, "init", settings=SMALL).returncode == 0
    file = tmp_path / "datasets/demo" / manifests.FILE
    file.write_text(file.read_text().replace('"seed": 0', '"seed": 1'))
    done = launch(tmp_path, "caption")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "was edited after the dataset was created" in line
    assert not (tmp_path / "datasets/demo/captions").exists()


@pytest.mark.slow
def test_half_written_part_and_altered_chunk(tmp_path):
    """Neither is read; `verify` removes both from the ledger, and `retry` of each run writes them again."""
    dataset = tmp_path / "datasets/demo"
    for job in ("caption", "latents"):
        assert launch(tmp_path, job, settings=SMALL).returncode == 0
    part = caption.part_path(dataset, 2)
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    chunk = next(path for path in (dataset / "latents.zarr/latents/c/1").rglob("*") if path.is_file())
    altered = bytearray(chunk.read_bytes())
    altered[5000] ^= 4
    chunk.write_bytes(altered)
    store = Store(manifests.read(dataset))
    with pytest.raises(ValueError, match="shard 1"):
        store.read("latents", store.valid_rows())

    done = launch(tmp_path, "verify")
    assert "altered: caption 1 shards, such as 2; latents 1 shards, such as 1" in done.stdout, done.stderr
    runs = {name.split("-")[2]: name for name in os.listdir(tmp_path / "runs")}  # noqa: PTH208 - only names are needed
    for job in ("caption", "latents"):
        done = launch(tmp_path, "retry", runs[job])
        assert done.returncode == 0, done.stderr
        assert "1 of 4 shards" in done.stdout
    assert part.read_bytes()[-4:] == b"PAR1"
    assert "matches its ledger" in launch(tmp_path, "verify").stdout
