import dataclasses
import os
import shutil

import pyarrow.parquet as pq
import pytest

from jobs.state import ledger
from jobs.tasks import caption, latents
from pixart.atomic import write_atomically
from pixart.data import manifest as manifests
from pixart.data.store.zarr_store import Store


@pytest.fixture
def dataset(small_recipe, tmp_path) -> str:
    """Copy of the finished dataset, which a test may damage."""
    shutil.copytree(small_recipe.data.path, tmp_path / "dataset")
    return str(tmp_path / "dataset")


def test_entries_record_the_finished_shards(dataset):
    entries = ledger.entries(dataset, "latents", [0, 1, 2, 3, 9])
    assert sorted(entries) == [0, 1, 2, 3]
    assert all((entry.rows, entry.valid) == (16, 16) for entry in entries.values())
    assert {entry.manifest for entry in entries.values()} == {manifests.read(dataset).hash}
    captions = ledger.entries(dataset, "caption", [0])[0]
    assert entries[0].inputs == captions.checksum


def test_finished_shards_are_skipped(dataset):
    part = caption.part_path(dataset, 1)
    before = part.stat().st_mtime_ns, ledger.path(dataset, "latents", 1).stat().st_mtime_ns
    caption.run(dataset, [1])
    latents.run(dataset, [1])
    assert (part.stat().st_mtime_ns, ledger.path(dataset, "latents", 1).stat().st_mtime_ns) == before


def test_a_retry_gives_the_same_bytes(dataset):
    before = {job: ledger.entries(dataset, job, [2])[2] for job in ("caption", "latents")}
    for job in before:
        ledger.path(dataset, job, 2).unlink()
    with pytest.raises(ValueError, match="no captions"):
        latents.run(dataset, [2])
    caption.run(dataset, [2])
    latents.run(dataset, [2])
    for job, entry in before.items():
        again = ledger.entries(dataset, job, [2])[2]
        assert dataclasses.replace(again, seconds=0) == dataclasses.replace(entry, seconds=0)


def test_captions_of_another_manifest_are_recreated(dataset):
    entry = ledger.read(dataset, "caption", 0)
    ledger.record(dataset, "caption", 0, dataclasses.replace(entry, manifest="other"))
    assert not caption.complete(dataset, manifests.read(dataset).hash, 0)
    caption.run(dataset, [0])
    assert caption.complete(dataset, manifests.read(dataset).hash, 0)


def test_changed_captions_are_noticed(dataset):
    caption.part_path(dataset, 3).write_bytes(caption.part_path(dataset, 2).read_bytes())
    ledger.path(dataset, "latents", 3).unlink()
    with pytest.raises(ValueError, match="does not match the ledger"):
        latents.run(dataset, [3])


def test_failed_shard_does_not_stop_the_others(dataset):
    for shard in range(4):
        ledger.path(dataset, "latents", shard).unlink()
    caption.part_path(dataset, 1).write_bytes(b"")
    with pytest.raises(ValueError, match="1 of 4 shards failed; shard 1"):
        latents.run(dataset, [0, 1, 2, 3])
    assert sorted(ledger.entries(dataset, "latents", [0, 1, 2, 3])) == [0, 2, 3]


def test_damaged_images_keep_their_rows(tmp_path, small_recipe):
    """The row of a damaged file is invalid with a reason, and the other rows keep their indices."""
    from jobs.tasks import init_dataset
    from pixart.config.recipe import to_json
    from pixart.data.sources.open import open_source

    folder = tmp_path / "images"
    folder.mkdir()
    for index, item in enumerate(open_source("demo", max_images=6, seed=0, image_size=64).read(0, 6)):
        (folder / f"{index}.png").write_bytes(item.data if index != 4 else item.data[:100])
        (folder / f"{index}.txt").write_text(f"scene {index}")
    data = dataclasses.replace(
        small_recipe.data,
        path=str(tmp_path / "d"),
        source=str(folder),
        max_images=None,
        num_shards=2,
        store_text_embeddings=False,
    )
    init_dataset.run(to_json(dataclasses.replace(small_recipe, data=data)))
    caption.run(data.path, [0, 1])
    latents.run(data.path, [0, 1])
    table = pq.read_table(caption.part_path(data.path, 1)).to_pydict()
    assert table["valid"] == [True, False, True]
    assert table["caption"] == ["scene 3", "", "scene 5"]
    assert table["reason"][1] == "truncated"
    assert Store(manifests.read(data.path)).valid_rows().tolist() == [0, 1, 2, 3, 5]
    assert ledger.read(data.path, "latents", 1).valid == 2


def test_only_entries_of_the_present_inputs_are_current(tmp_path):
    entry = ledger.Entry(manifest="m", inputs="", rows=2, valid=2, checksum="a", seconds=1.0, versions={})
    (tmp_path / "captions").mkdir()
    (tmp_path / "latents.zarr/valid/c").mkdir(parents=True)
    (tmp_path / "latents.zarr/zarr.json").write_text("{}")
    for shard in range(5):
        (tmp_path / f"captions/{shard:05d}.parquet").write_text("")
        (tmp_path / f"latents.zarr/valid/c/{shard}").write_text("")
        ledger.record(tmp_path, "caption", shard, entry)
        ledger.record(tmp_path, "latents", shard, dataclasses.replace(entry, inputs="a"))
    ledger.record(tmp_path, "caption", 1, dataclasses.replace(entry, checksum="b"))  # written again
    ledger.path(tmp_path, "caption", 2).unlink()
    ledger.record(tmp_path, "latents", 3, dataclasses.replace(entry, inputs="a", manifest="other"))
    ledger.path(tmp_path, "latents", 4).write_text('{"manifest": ')
    (tmp_path / "ledger/latents/00000 (copy).json").write_text("{}")
    shards = list(range(6))
    assert ledger.current(tmp_path, "caption", shards, "m") == {0, 1, 3, 4}
    assert ledger.current(tmp_path, "latents", shards, "m") == {0}
    assert ledger.shards(tmp_path, "latents") == {0, 1, 2, 3, 4}
    (tmp_path / "captions/00003.parquet").unlink()
    assert ledger.current(tmp_path, "caption", shards, "m") == {0, 1, 4}  # an entry without its data
    ledger.drop_stale_entries(tmp_path, "latents", [0, 1, 4, 5], "m")
    assert ledger.shards(tmp_path, "latents") == {0, 2, 3}


def test_write_atomically_leaves_no_temporary_file(tmp_path, monkeypatch):
    target = tmp_path / "file"
    write_atomically(target, "one")
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(target, "two")
    assert target.read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
