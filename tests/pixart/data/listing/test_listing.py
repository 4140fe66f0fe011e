"""The listing of a source: made once, in bounded memory, and read by tasks from the dataset's folder."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.spec import AbstractFileSystem

from jobs.tasks import init_dataset
from pixart.config.recipe import to_json
from pixart.data import manifest as manifests
from pixart.data.listing.blocks import BLOCK_ROWS, Writer, open_reader
from pixart.data.sources.open import open_source
from pixart.recipes import demo
from tests.pixart.data.sources.test_sources import MAKERS, noise_image, write


class GeneratedFileSystem(AbstractFileSystem):
    """A file system of FOLDERS folders with FILES empty images each, which counts how often it is listed."""

    protocol = "generated"
    folders, files = 1000, 1000
    listed = 0

    def ls(self, path, detail=True, **_):
        type(self).listed += 1
        path = self._strip_protocol(path).strip("/")
        if path == "root":
            return [{"name": f"root/{name:04d}", "type": "directory", "size": 0} for name in range(self.folders)]
        return [{"name": f"{path}/{name:06d}.jpg", "type": "file", "size": 0} for name in range(self.files)]

    def isdir(self, path):
        return True

    def cat_ranges(self, paths, starts, ends, **_):
        return [b""] * len(paths)


MEASURE = """
import json, resource, sys, time
from pathlib import Path
import fsspec
from tests.pixart.data.listing.test_listing import GeneratedFileSystem
from pixart.data.sources.open import open_source
fsspec.register_implementation("generated", GeneratedFileSystem)
def peak(): return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
GeneratedFileSystem.folders = 2
open_source("generated://root")
before, begun = peak(), time.perf_counter()
GeneratedFileSystem.folders = int(sys.argv[1])
source = open_source("generated://root", listing_file=Path(sys.argv[2]))
listed, seconds = GeneratedFileSystem.listed, time.perf_counter() - begun
again = open_source("generated://root", listing_file=Path(sys.argv[2]))
rows = [item.id for item in again.read(len(again) - 2, len(again))]
print(json.dumps({"rows": len(source), "mib": peak() - before, "seconds": seconds, "last": rows,
                  "listed_again": GeneratedFileSystem.listed - listed}))
"""


@pytest.mark.parametrize(
    "folders", [pytest.param(50, id="50,000"), pytest.param(1000, id="1,000,000", marks=pytest.mark.slow)]
)
def test_memory_does_not_grow_with_the_files(tmp_path, folders, record_property):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folders), str(tmp_path / "listing.bin")],
        cwd=Path(__file__).parents[4],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])},
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(done.stdout.splitlines()[-1])
    record_property("measured", measured)
    print(measured)
    assert measured["rows"] == 1000 * folders
    assert measured["mib"] < 64
    assert measured["listed_again"] == 0
    assert measured["last"] == [f"{folders - 1:04d}/{name:06d}.jpg" for name in (998, 999)]


@pytest.mark.parametrize("kind", MAKERS)
def test_a_task_reads_the_stored_listing(tmp_path, kind, monkeypatch):
    MAKERS[kind](f"{tmp_path}/images")
    recipe = demo(str(tmp_path))
    data = dataclasses.replace(recipe.data, source=f"{tmp_path}/images", max_images=None)
    init_dataset.run(to_json(dataclasses.replace(recipe, data=data)))
    manifest = manifests.read(data.path)
    expected = list(open_source(f"{tmp_path}/images").read(0, 99))
    write(f"{tmp_path}/images/another.jpg", noise_image(1))  # is not seen
    monkeypatch.setattr("pixart.data.listing.walk.Place.files", None)  # nothing is listed
    assert list(manifests.open_images(manifest).read(0, 99)) == expected
    listing = Path(data.path) / manifests.LISTING_FILE
    content = listing.read_bytes()
    listing.write_bytes(content[:-40] + b"x" + content[-39:])
    with pytest.raises(ValueError, match=r"source-listing\.bin: is "):
        manifests.open_images(manifest)


def test_an_image_that_is_gone_is_named(tmp_path):
    for name in "ab":
        write(f"{tmp_path}/images/{name}.jpg", noise_image(1))
    source = open_source(f"{tmp_path}/images", listing_file=tmp_path / "listing.bin")
    (tmp_path / "images/b.jpg").unlink()
    assert len(list(source.read(0, 1))) == 1
    with pytest.raises(ValueError, match=r"b\.jpg is missing, but was there when it was listed"):
        list(source.read(0, 2))


def test_ranges_of_blocks_and_damage(tmp_path):
    with (tmp_path / "rows").open("w+b") as file:
        writer = Writer(file)
        for row in range(2 * BLOCK_ROWS + 5):
            writer.add([row, f"name {row} \udcff"])
        writer.finish({"kind": "image"})
    reader = open_reader(tmp_path / "rows")
    rows = [[row, f"name {row} \udcff"] for row in range(reader.rows)]
    for start, stop in ((0, 1), (0, 9999), (1023, 1026), (2048, 2053), (5, 5), (9999, 10_000)):
        assert list(reader.read(start, stop)) == rows[start:stop]
    content = bytearray((tmp_path / "rows").read_bytes())
    content[20] ^= 1
    (tmp_path / "rows").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged; restore it"):
        list(open_reader(tmp_path / "rows").read(0, 1))
    (tmp_path / "rows").write_bytes(content[:-1])
    with pytest.raises(ValueError, match="is damaged; restore it"):
        open_reader(tmp_path / "rows")


def test_a_folder_of_another_file_system():
    fsspec.filesystem("memory").pipe({"/listing/b/0.jpg": b"x", "/listing/a.jpg": b"y", "/listing/.c.jpg": b"z"})
    try:
        assert [item.id for item in open_source("memory://listing").read(0, 9)] == ["a.jpg", "b/0.jpg"]
    finally:
        MemoryFileSystem.store.clear()
