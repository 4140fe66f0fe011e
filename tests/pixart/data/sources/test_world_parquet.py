"""Parquet files as other tools write them; see `test_world`."""

import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixart.config.dataset import ColumnsConfig
from pixart.data.sources.open import open_source
from tests.pixart.data.sources.test_sources import noise_image
from tests.pixart.data.sources.test_world import CASES, cases, items_of, part_of

__all__ = ["cases"]
PATHS = {"image": [{"bytes": None, "path": f"images/{row}.jpg"} for row in range(3)], "label": [0, 1, 2]}


def write_rows(folder, name: str = "train-00000-of-00001.parquet", **columns) -> None:
    """Write a parquet file; `image` is made for it unless it is given."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = len(next(iter(columns.values()))) if columns else 2
    if not {"image", "jpg"} & set(columns):
        columns = {"image": [{"bytes": noise_image(row), "path": None} for row in range(rows)]} | columns
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize("kind", ["made", "shared"])
@pytest.mark.parametrize("place", ["{}/images", "{}/data/images", "{}/../images"])
def test_images_that_a_file_names(tmp_path, kind, place):
    source, name = tmp_path / "source", "data/train.parquet"
    write_rows(source, name, **PATHS)
    if kind == "shared":
        if not CASES.is_dir():
            pytest.skip(f"the cases are not at {CASES}")
        shutil.copyfile(CASES / "parquet_path_only/train-00000-of-00001.parquet", source / name)
    with pytest.raises(ValueError, match=r"holds paths and no images, and image images/0\.jpg is missing"):
        open_source(f"{source}")
    images = source / "images" if place == "{}/../images" else source / place.format("").lstrip("/")
    images.mkdir()
    for row in range(2):
        (images / f"{row}.jpg").write_bytes(noise_image(row))
    items = items_of(source)
    assert [item.data for item in items] == [noise_image(0), noise_image(1), b""]
    assert [row[:2] for row in part_of(source)] == [(True, ""), (True, ""), (False, "unreadable")]
    assert [item.label for item in items] == [0, 1, 2]


def test_a_column_of_paths(tmp_path):
    (tmp_path / "0.jpg").write_bytes(noise_image(0))
    write_rows(tmp_path, image=["0.jpg", f"{tmp_path}/0.jpg"], text=["one", "two"])
    assert [(item.data, item.text) for item in items_of(tmp_path)] == [(noise_image(0), "one"), (noise_image(0), "two")]


def test_the_first_caption_that_is_not_empty(cases):
    texts = [None, "short alt text here", ""]
    captions = ["a long caption of the first", "second", "third caption is long"]

    def make(folder):
        write_rows(folder, text=texts, caption=captions)

    expected = ["a long caption of the first", "short alt text here", "third caption is long"]
    assert [item.text for item in items_of(cases("parquet_text_null_caption_set", make))][:3] == expected


def test_columns_that_the_first_file_has_not(cases):
    def make(folder):
        write_rows(folder, "a.parquet")
        write_rows(folder, "b.parquet", text=["a caption of three", "a caption of four"], label=[1, 2])

    source = cases("parquet_columns_in_later_file", make)
    assert [(item.text, item.label) for item in items_of(source)] == [
        ("", -1),
        ("", -1),
        ("a caption of three", 1),
        ("a caption of four", 2),
    ]
    counts = open_source(f"{source}").contents()
    assert (counts.labelled, counts.largest_label, counts.has_words) == (2, 2, True)
    assert counts.columns == {"image": ["image"], "caption": ["text"], "label": ["label"]}


def test_one_of_a_list_of_captions(cases):
    both = ["a first caption", "a second one"]
    source = cases("parquet_list_captions", lambda folder: write_rows(folder, caption=[both] * 3))
    texts = [[item.text for item in items_of(source, seed=seed)] for seed in range(8)]
    assert texts == [[item.text for item in items_of(source, seed=seed)] for seed in range(8)]
    assert {text for row in texts for text in row} == set(both)
    assert [item.text for item in open_source(f"{source}").read(2, 3)] == texts[0][2:3]


@pytest.mark.parametrize(
    ("name", "file", "image"),
    [
        ("commoncatalog", "part-00000.parquet", "jpg"),
        ("commoncatalog_nested", "0/least_dim_range=256-512/part-0.parquet", "image"),
    ],
)
def test_commoncatalog(cases, name, file, image):
    def make(folder):
        images = {image: [noise_image(row) for row in range(3)]}
        write_rows(folder, file, **images, blip2_caption=[f"a photo {row}" for row in range(3)], caption=[""] * 3)

    items = items_of(cases(name, make))
    assert [item.text for item in items] == [f"a photo {row}" for row in range(len(items))]


def test_labels_by_wordnet_id_and_words_by_class(cases, tmp_path):
    def make(folder):
        ids = [f"n0{row}_{row}" for row in range(12)]
        write_rows(folder, "train-00000-of-07760.parquet", id=ids, **{"class": ["acorn"] * 12})

    folder = cases("imagenet21k_id_class", make)
    counts_file = tmp_path / "dataset/source-files.json"
    source = open_source(f"{folder}", counts_file=counts_file)
    items = list(source.read(0, 12))
    ids = sorted(f"n0{row}" for row in range(12))
    assert [ids[item.label] for item in items] == [f"n0{row}" for row in range(12)]
    assert {(item.text, item.text_is_class) for item in items} == {("acorn", True)}
    assert source.class_names == ["acorn"] * 12
    assert (source.contents().largest_label, source.contents().has_words) == (11, True)
    assert json.loads((tmp_path / "dataset/source-classes.json").read_text())["ids"] == ids
    again = open_source(f"{folder}", counts_file=counts_file)
    assert list(again.read(0, 12)) == items
    assert again.class_names == source.class_names


def test_columns_that_the_configuration_names(tmp_path):
    scans = [noise_image(0), noise_image(1)]
    write_rows(tmp_path, image=[b"", b""], scan=scans, breed=["pug", "beagle"], note=["x", "y"])
    columns = ColumnsConfig(image="scan", caption="note", label="breed")
    source = open_source(f"{tmp_path}", columns=columns)
    items = list(source.read(0, 2))
    assert [(item.data, item.text, item.label) for item in items] == [
        (noise_image(0), "x", 1),
        (noise_image(1), "y", 0),
    ]
    assert source.class_names == ["beagle", "pug"]
    with pytest.raises(ValueError, match=r"it must have a column `photo`, binary .*data.columns.image"):
        open_source(f"{tmp_path}", columns=ColumnsConfig(image="photo"))


def test_partitions_are_columns(tmp_path):
    for label in (0, 12):
        write_rows(tmp_path, f"label={label}/breed=b%20{label}/0.parquet", text=["one", "two"])
    assert [item.label for item in items_of(tmp_path)] == [0, 0, 12, 12]
    named = open_source(f"{tmp_path}", columns=ColumnsConfig(label="breed"))
    assert named.class_names == ["b 0", "b 12"]
    assert named.contents().largest_label == 1


def test_labels_that_are_no_index(tmp_path):
    write_rows(tmp_path, label=[float("nan"), 2.0, None, -7.0, 1.5])
    source = open_source(f"{tmp_path}")
    assert [(item.label, item.label_problem) for item in source.read(0, 5)] == [
        (-1, ""),
        (2, ""),
        (-1, ""),
        (-1, "its label is -7, out of range"),
        (-1, "its label is '1.5', not an integer"),
    ]
    assert (source.contents().labelled, source.contents().largest_label) == (1, 2)


def test_texts_that_are_not_utf8(tmp_path):
    texts = pa.Array.from_buffers(pa.string(), 2, pa.array([b"caf\xe9", b"fine"]).buffers())
    write_rows(tmp_path, text=texts)
    assert [item.text for item in items_of(tmp_path)] == ["caf\ufffd", "fine"]
