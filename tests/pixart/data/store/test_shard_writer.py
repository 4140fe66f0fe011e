"""A shard that is written in blocks has the files of one that is written at once."""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from pixart.atomic import temporary_path
from pixart.config.dataset import DataConfig
from pixart.data.manifest import Adoption, Manifest
from pixart.data.store.layout import VALID, columns_of, layout, row_digest
from pixart.data.store.shard_writer import ShardWriter
from pixart.data.store.zarr_store import Store, channel_sums, create, write_shard

ROWS = 100


def make_manifest(path: Path, rows: int) -> Manifest:
    return Manifest(
        data=DataConfig(path=str(path), num_shards=2, max_text_tokens=5, captioner="adopted"),
        images=ROWS + rows,
        rows_per_shard=ROWS,
        class_names=(),
        latent_shape=(3, 4, 4),
        text_dim=8,
        models={},
        adopted=Adoption(form="labels", shard_rows=(ROWS, rows)),
    )


def make_columns(manifest: Manifest, rows: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    values = {
        name: random.integers(0, 100, (rows, *shape)).astype(dtype) for name, (shape, dtype) in layout(manifest).items()
    }
    return {**values, VALID: random.random(rows) < 0.7}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def append(writer: ShardWriter, columns: dict[str, np.ndarray], size: int) -> None:
    for start in range(0, len(columns[VALID]), size):
        block = {name: values[start : start + size] for name, values in columns.items()}
        writer.append(block, channel_sums(block["latents"], block[VALID]))


@pytest.mark.parametrize("rows", [ROWS, 37])
@pytest.mark.parametrize("size", [1, 16, 1000])
def test_the_files_are_those_of_a_shard_written_at_once(tmp_path, rows, size):
    manifests = [make_manifest(tmp_path / name, rows) for name in ("whole", "blocks")]
    columns = make_columns(manifests[0], rows)
    for manifest in manifests:
        create(manifest)
    write_shard(manifests[0], 1, columns)
    with ShardWriter(manifests[1], 1) as writer:
        append(writer, columns, size)
        digests = writer.commit()
    assert files(tmp_path / "whole") == files(tmp_path / "blocks")
    store, start = Store(manifests[1]), ROWS
    for name in store.arrays:
        assert (store.read(name, np.arange(start, start + rows)) == columns[name]).all()
    assert digests == {name: row_digest(values) for name, values in columns.items()}
    assert store.valid_rows().tolist() == (start + np.flatnonzero(columns[VALID])).tolist()
    assert manifests[1].shard_range(1) == (ROWS, ROWS + rows)


def test_uncommitted_files_and_leftovers_of_a_killed_attempt_are_removed(tmp_path):
    manifest = make_manifest(tmp_path, ROWS)
    create(manifest)
    before = files(tmp_path)
    columns = make_columns(manifest, ROWS)
    with ShardWriter(manifest, 1) as writer:
        append(writer, columns, 16)
    assert files(tmp_path) == before
    process = subprocess.Popen(["true"])
    process.wait()
    column = columns_of(manifest)["latents"]
    left = temporary_path(tmp_path / column.file(1)).name.replace(f"-{os.getpid()}-", f"-{process.pid}-")
    (tmp_path / column.file(1)).with_name(left).write_bytes(b"part of the rows")
    with ShardWriter(manifest, 1) as writer:
        append(writer, columns, 16)
        writer.commit()
    assert not [name for name in files(tmp_path) if name.endswith(".partial")]


def test_an_error_of_the_disk_is_raised(tmp_path, monkeypatch):
    manifest = make_manifest(tmp_path, ROWS)
    create(manifest)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pixart.data.store.layout.os.writev", full)
    with ShardWriter(manifest, 1) as writer:
        append(writer, make_columns(manifest, ROWS), 1000)
        with pytest.raises(OSError, match="No space left"):
            writer.commit()
