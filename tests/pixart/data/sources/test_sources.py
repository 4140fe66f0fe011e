import io
import json
import os
import random
import tarfile
import uuid
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from pixart.data.sources.open import open_source
from pixart.demo.scenes import SHAPES, caption, make_scene, render

PHOTOS = Path(__file__).parents[4] / "../shared/data/photos"
ROWS = 25


def noise_image(index: int, suffix: str = ".jpg", side: int = 16) -> bytes:
    """Return an encoded image of noise, whose size depends on its side only; row `index` of every source below."""
    pixels = random.Random(index).randbytes(side * side * 3)
    encoded = io.BytesIO()
    Image.frombytes("RGB", (side, side), pixels).save(encoded, Image.registered_extensions()[suffix])
    return encoded.getvalue()


def write(path: str, data: bytes) -> None:
    with fsspec.open(path, "wb", auto_mkdir=True) as file:
        file.write(data)


def make_flat_folder(url: str) -> None:
    for index in range(ROWS):
        suffix = (".jpg", ".JPEG", ".png", ".webp")[index % 4]
        write(f"{url}/{index:03d}{suffix}", noise_image(index, suffix.lower()))
        if index % 5:
            write(f"{url}/{index:03d}.txt", f" caption {index}\n".encode())


def make_class_folder(url: str) -> None:
    for index in range(ROWS):
        name = ("brown_bear", "acorn", "go-kart")[index // 10]
        write(f"{url}/train/{name}/{index:03d}.jpg", noise_image(index))


def make_parquet(url: str, side: int = 16) -> None:
    """Write three files of 10, 10 and 5 rows, in row groups of 4."""
    features = {"label": {"names": ["cat", "fire_truck"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    for part in range(3):
        rows = range(10 * part, min(10 * part + 10, ROWS))
        table = pa.table(
            {
                "label": pa.array([index % 2 for index in rows], pa.int64()),
                "image": [{"bytes": noise_image(index, side=side), "path": f"{index}.jpg"} for index in rows],
            }
        )
        encoded = io.BytesIO()
        metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
        pq.write_table(table.replace_schema_metadata(metadata), encoded, row_group_size=4, compression="NONE")
        write(f"{url}/data/train-{part:05d}.parquet", encoded.getvalue())


def make_tars(url: str, side: int = 16) -> None:
    """Write three tars of 10, 10 and 5 rows, with captions in .txt, in .json or without captions."""
    for part in range(3):
        encoded = io.BytesIO()
        with tarfile.open(fileobj=encoded, mode="w") as tar:
            for index in range(10 * part, min(10 * part + 10, ROWS)):
                text = {0: ("txt", f"caption {index}"), 1: ("json", json.dumps({"caption": f"caption {index}"}))}
                members = [("cls", str(index % 7)), ("jpg", noise_image(index, side=side)), ("seg.png", b"ignored")]
                for suffix, content in [*members, *([text[index % 3]] if index % 3 in text else [])]:
                    data = content.encode() if isinstance(content, str) else content
                    info = tarfile.TarInfo(f"a.b/{index:06d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
        write(f"{url}/{part:05d}.tar", encoded.getvalue())


MAKERS = {"flat": make_flat_folder, "class": make_class_folder, "parquet": make_parquet, "tar": make_tars}


@pytest.fixture(params=["path", "file://", "memory://"])
def root(request, tmp_path):
    return {"path": f"{tmp_path}/it", "file://": f"file://{tmp_path}/it"}.get(
        request.param, f"memory://{uuid.uuid4().hex}"
    )


@pytest.mark.parametrize("kind", MAKERS)
def test_ranges_equal_slices_of_all_items(kind, root):
    MAKERS[kind](root)
    source = open_source(root)
    items = list(source.read(0, len(source)))
    assert len(items) == len(source) == ROWS
    assert len({item.id for item in items}) == ROWS
    for start, stop in [
        (0, 1),
        (0, 10),
        (3, 4),
        (4, 8),
        (9, 11),
        (7, 23),
        (20, 25),
        (24, 25),
        (12, 12),
        (24, 99),
        (30, 40),
    ]:
        assert list(source.read(start, stop)) == items[start:stop]
        assert list(open_source(root).read(start, stop)) == items[start:stop]


@pytest.mark.parametrize("kind", ["flat", "parquet", "tar"])  # the rows of `class` are sorted by class
def test_images_are_unchanged_and_in_order(kind, root):
    MAKERS[kind](root)
    for index, item in enumerate(open_source(root).read(0, ROWS)):
        suffix = (".jpg", ".jpg", ".png", ".webp")[index % 4] if kind == "flat" else ".jpg"
        assert item.data == noise_image(index, suffix)


@pytest.mark.parametrize("kind", MAKERS)
def test_max_images_limits_the_rows(kind, tmp_path):
    MAKERS[kind](f"{tmp_path}")
    full, source = open_source(f"{tmp_path}"), open_source(f"{tmp_path}", max_images=12)
    assert list(source.read(0, 99)) == list(full.read(0, 12))
    assert len(source) == 12
    assert source.class_names == full.class_names
    assert len(open_source(f"{tmp_path}", max_images=99)) == ROWS


def test_flat_folder_has_texts_of_sidecar_files_and_no_labels(tmp_path):
    make_flat_folder(f"{tmp_path}")
    source = open_source(f"{tmp_path}")
    items = list(source.read(0, ROWS))
    assert source.class_names == []
    assert {item.label for item in items} == {-1}
    assert [item.text for item in items] == [f"caption {index}" if index % 5 else "" for index in range(ROWS)]
    assert not any(item.text_is_class for item in items)
    assert [item.id for item in items[:4]] == ["000.jpg", "001.JPEG", "002.png", "003.webp"]


def test_class_folder_has_labels_of_sorted_directories(tmp_path):
    make_class_folder(f"{tmp_path}")
    write(f"{tmp_path}/train/acorn/010.txt", b"an acorn on the ground")
    write(f"{tmp_path}/.cache/zebra/000.jpg", noise_image(0))
    write(f"{tmp_path}/train/acorn/._010.jpg", b"")
    source = open_source(f"{tmp_path}")
    items = list(source.read(0, ROWS))
    assert source.class_names == ["acorn", "brown_bear", "go-kart"]
    assert [item.label for item in items] == [0] * 10 + [1] * 10 + [2] * 5
    assert (items[0].text, items[0].text_is_class) == ("an acorn on the ground", False)
    assert (items[10].text, items[10].text_is_class) == ("brown bear", True)
    assert items[10].id == "train/brown_bear/000.jpg"


def test_symbolic_links_and_special_characters_in_names(tmp_path):
    write(f"{tmp_path}/elsewhere/a[1] b?#%20.jpg", noise_image(1))
    (tmp_path / "images [2024]").mkdir()
    (tmp_path / "images [2024]" / "cat").symlink_to(tmp_path / "elsewhere")
    write(f"{tmp_path}/images [2024]/dog/b.jpg", noise_image(2))
    item, _ = open_source(f"{tmp_path}/images [2024]").read(0, 9)
    assert (item.id, item.text, item.data) == ("cat/a[1] b?#%20.jpg", "cat", noise_image(1))


def test_pipes_and_broken_links_are_ignored(tmp_path):
    write(f"{tmp_path}/a.jpg", noise_image(1))
    (tmp_path / "b.jpg").symlink_to("a.jpg")
    (tmp_path / "c.jpg").symlink_to("nowhere")
    os.mkfifo(tmp_path / "d.jpg")
    assert [item.id for item in open_source(f"{tmp_path}").read(0, 9)] == ["a.jpg", "b.jpg"]


def test_names_that_are_not_utf8_are_escaped(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)  # noqa: PTH102 - a path of bytes
    write(f"{tmp_path}/dog/b.jpg", noise_image(2))
    with open(folder + b"/n\xf6.jpg", "wb") as file:  # noqa: PTH123
        file.write(noise_image(1))
    source = open_source(f"{tmp_path}")
    item, _ = source.read(0, 9)
    assert (item.id, item.text, item.data) == (r"caf\xe9/n\xf6.jpg", r"caf\xe9", noise_image(1))
    assert source.class_names == [r"caf\xe9", "dog"]


def test_parquet_has_labels_and_class_names_of_its_schema(tmp_path):
    make_parquet(f"{tmp_path}")
    source = open_source(f"{tmp_path}")
    items = list(source.read(0, ROWS))
    assert source.class_names == ["cat", "fire_truck"]
    assert [item.label for item in items] == [index % 2 for index in range(ROWS)]
    assert (items[1].text, items[1].text_is_class) == ("fire truck", True)
    assert items[13].id == "data/train-00001.parquet:3"


@pytest.mark.parametrize("column", ["text", "caption"])
def test_parquet_with_a_binary_column_and_text(tmp_path, column):
    pq.write_table(pa.table({column: ["one", None], "image": [noise_image(1), None]}), tmp_path / "a.parquet")
    source = open_source(f"{tmp_path}/a.parquet")
    items = list(source.read(0, 2))
    assert source.class_names == []
    assert [(item.id, item.text, item.label) for item in items] == [("a.parquet:0", "one", -1), ("a.parquet:1", "", -1)]
    assert [item.data for item in items] == [noise_image(1), b""]  # a missing image is empty, and rejected by decoding


def test_tar_has_labels_and_captions_of_its_members(tmp_path):
    make_tars(f"{tmp_path}")
    items = list(open_source(f"{tmp_path}").read(0, ROWS))
    assert [item.label for item in items] == [index % 7 for index in range(ROWS)]
    assert [item.text for item in items] == [f"caption {index}" if index % 3 < 2 else "" for index in range(ROWS)]
    assert items[13].id == "00001.tar:a.b/000013"


def test_patterns_and_single_files(tmp_path):
    make_parquet(f"{tmp_path}")
    make_tars(f"{tmp_path}")
    assert len(open_source(f"{tmp_path}/data/train-0000[12].parquet")) == 15
    assert len(open_source(f"{tmp_path}/**/*.parquet")) == ROWS
    assert len(open_source(f"{tmp_path}/00002.tar")) == 5


def test_demo_source_has_rendered_scenes():
    source = open_source("demo", max_images=20, seed=3, image_size=32)
    items = list(source.read(0, 99))
    assert len(items) == len(source) == 20
    assert source.class_names == list(SHAPES)
    assert list(source.read(5, 9)) == items[5:9]
    scene = make_scene(3, 7)
    assert (items[7].text, source.class_names[items[7].label]) == (caption(scene), scene.shape)
    assert Image.open(io.BytesIO(items[7].data)).tobytes() == render(scene, 32).tobytes()


class CountingFileSystem(MemoryFileSystem):
    """A file system that counts the bytes read from each file."""

    protocol = "counting"
    bytes_read: dict[str, int] = {}  # noqa: RUF012 - shared by all instances intentionally

    def _open(self, path, mode="rb", **options):
        file = super()._open(path, mode, **options)
        if mode != "rb":
            return file
        return CountedFile(file.getvalue(), self.bytes_read, path)


class CountedFile(io.BytesIO):
    def __init__(self, data, counts, path):
        super().__init__(data)
        self.counts, self.path = counts, path

    def read(self, size=-1):
        data = super().read(size)
        self.counts[self.path] = self.counts.get(self.path, 0) + len(data)
        return data


@pytest.fixture
def counting():
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    CountingFileSystem.bytes_read.clear()
    yield f"counting://{uuid.uuid4().hex}", CountingFileSystem.bytes_read
    MemoryFileSystem.store.clear()


@pytest.mark.parametrize(
    ("make", "rows", "overhead"),
    [(make_parquet, 4, 66_000), (make_tars, 2, 25_000)],  # 64 KiB for the footer; the headers of a tar
)
def test_reading_a_range_reads_only_the_required_bytes(counting, make, rows, overhead):
    url, bytes_read = counting
    make(url, side=600)
    size = len(noise_image(0, side=600))
    assert size > 200_000
    source = open_source(url)
    assert max(bytes_read.values()) < 2 * overhead  # no image; the footer of the first parquet file is read twice
    assert len(bytes_read) == 3
    bytes_read.clear()
    items = list(source.read(12, 14))  # rows 2 and 3 of the second file, in its first row group of 4
    assert [item.data for item in items] == [noise_image(12, side=600), noise_image(13, side=600)]
    (read,) = bytes_read.values()  # one file
    assert abs(read - rows * size) < overhead


@pytest.mark.parametrize("make", [make_parquet, make_tars])
def test_counts_file_saves_opening_every_file(counting, tmp_path, make):
    url, bytes_read = counting
    make(url)
    counts_file = tmp_path / "dataset" / "counts.json"
    items = list(open_source(url, counts_file=counts_file).read(0, ROWS))
    assert len(bytes_read) == 3
    bytes_read.clear()
    source = open_source(url, counts_file=counts_file)
    assert list(source.read(21, 25)) == items[21:]
    assert len(bytes_read) <= 2  # the file of the range, and for parquet the schema of the first file
    last = max(fsspec.filesystem("counting").find(url))
    fsspec.filesystem("counting").rm(last)
    make(url, side=32)  # other sizes: all rows are counted again
    assert len(open_source(url, counts_file=counts_file)) == ROWS
    assert list(open_source(url, counts_file=counts_file).read(24, 25)) == list(open_source(url).read(24, 25))


def make_nothing(path: Path) -> None:
    pass


def make_text(path: Path) -> None:
    (path / "README.md").write_text("no image")


def make_mixed(path: Path) -> None:
    make_parquet(f"{path}")
    make_tars(f"{path}")
    (path / "0.png").write_bytes(noise_image(0, ".png"))


def make_empty_parquet(path: Path) -> None:
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), path / "a.parquet")


def make_empty_tar(path: Path) -> None:
    tarfile.open(path / "a.tar", "w").close()


def make_invalid_parquet(path: Path) -> None:
    (path / "a.parquet").write_bytes(b"not parquet")


def make_tar_cut_in_a_member(path: Path) -> None:
    make_tars(f"{path}")
    os.truncate(path / "00001.tar", 1100)


def make_tar_cut_between_members(path: Path) -> None:
    make_tars(f"{path}")
    os.truncate(path / "00001.tar", 1024)


def make_no_image_column(path: Path) -> None:
    pq.write_table(pa.table({"photo": [b""], "text": [""]}), path / "a.parquet")


def make_string_label(path: Path) -> None:
    pq.write_table(pa.table({"image": [b""], "label": ["cat"]}), path / "a.parquet")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_nothing, "does not exist or is empty; a source must be"),
        (make_text, "contains no images; a source must be"),
        (make_mixed, "contains image and parquet and tar files; select one kind"),
        (make_empty_parquet, "contain no images; a source must be"),
        (make_empty_tar, "contain no images; a source must be"),
        (make_invalid_parquet, "a.parquet is not a parquet file"),
        (make_tar_cut_in_a_member, "00001.tar is not a complete tar file"),
        (make_tar_cut_between_members, "00001.tar is not a complete tar file"),
        (make_no_image_column, "its columns are photo, text; it must have a column `image`"),
        (make_string_label, "`label` has type string; it must have an integer type"),
    ],
)
def test_errors_name_the_url_and_the_problem(tmp_path, make, message):
    make(tmp_path)
    check_error(f"{tmp_path}", message)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("/no/such/folder", "does not exist"),
        ("/no/such/*.tar", "does not exist"),
        ("memory://nowhere", "does not exist"),
        ("nothing://bucket/images", "nothing"),
    ],
)
def test_missing_source_is_an_error(url, message):
    check_error(url, message)


def check_error(url: str, expected: str) -> None:
    with pytest.raises(ValueError, match="source") as raised:
        open_source(url)
    message = str(raised.value)
    assert message.startswith(f"source {url!r}: ")
    assert expected in message
    assert "\n" not in message


def test_class_that_is_not_a_number_is_a_problem_of_its_row(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("0.jpg", "0.cls", "1.jpg"):
            tar.addfile(tarfile.TarInfo(name))
    bad, good = open_source(f"{tmp_path}").read(0, 2)
    assert (bad.label, bad.label_problem) == (-1, "its label is '', not an integer")
    assert (good.label, good.label_problem) == (-1, "")


@pytest.mark.parametrize(("url", "max_images"), [("demo", None), ("demo", 0), ("memory://x", -1)])
def test_max_images_must_be_at_least_one(url, max_images):
    with pytest.raises(ValueError, match=f"source '{url}': the number of images.*at least 1"):
        open_source(url, max_images=max_images)


def test_folder_of_real_photos():
    if not PHOTOS.is_dir():
        pytest.skip(f"the photos are not at {PHOTOS}")
    source = open_source(f"{PHOTOS}")
    items = list(source.read(0, len(source)))
    assert source.class_names == sorted(folder.name for folder in PHOTOS.iterdir())
    assert [source.class_names[item.label] for item in items] == [item.id.split("/")[0] for item in items]
    assert list(source.read(40, 50)) == items[40:50]
    assert all(Image.open(io.BytesIO(item.data)).format == "JPEG" for item in items)
