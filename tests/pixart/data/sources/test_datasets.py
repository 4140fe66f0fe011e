"""Sources against Hugging Face datasets: the same rows in the same order, with the same labels and captions.

Each layout is read by `datasets.load_dataset` and by `open_source`.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pixart.data.sources.open import open_source
from tests.pixart.data.sources.test_sources import noise_image, write
from tests.pixart.data.sources.test_world import write_tar

IMAGES = [noise_image(index) for index in range(6)]
Row = tuple[bytes, int, str]  # image, label and caption


@pytest.fixture(scope="module")
def datasets():
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    module = pytest.importorskip("datasets")
    module.disable_progress_bars()
    return module


def put(folder: Path, files: dict[str, bytes | str]) -> None:
    for name, content in files.items():
        write(f"{folder}/{name}", content.encode() if isinstance(content, str) else content)


def jsonl(*rows: dict[str, Any]) -> str:
    return "".join(f"{json.dumps(row)}\n" for row in rows)


def parquet(folder: Path, name: str = "train.parquet", schema: Any = None, **columns: Any) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=schema), folder / name)


def images(*rows: int) -> list[dict[str, Any]]:
    return [{"bytes": IMAGES[row], "path": f"{row}.jpg"} for row in rows]


def rows_of_datasets(datasets: Any, folder: Path, cache: Path, builder: str, splits: list[str]) -> list[Row]:
    """Return the rows of the splits as datasets reads them, with the caption that is the first of ours."""
    loaded = datasets.load_dataset(builder, data_dir=f"{folder}", cache_dir=f"{cache}")
    assert sorted(loaded) == sorted(splits)
    rows = []
    for split in splits:
        part = loaded[split]
        column = next((name for name, feature in part.features.items() if isinstance(feature, datasets.Image)), "image")
        for values in part.cast_column(column, datasets.Image(decode=False)):
            image = values[column]
            data = b"" if image is None else image["bytes"] or Path(image["path"]).read_bytes()
            rows.append((data, label_of(values), caption_of(values)))
    return rows


def label_of(values: dict[str, Any]) -> int:
    return next((int(values[name]) for name in ("label", "cls", "label.cls") if values.get(name) is not None), -1)


def caption_of(values: dict[str, Any]) -> str:
    words = [values.get(name) for name in ("text", "caption", "txt", "text.txt")]
    nested = (values.get("json") or {}).get("caption")
    return next((word for word in (*words, nested) if word), "")


def rows_of_ours(url: str) -> list[Row]:
    source = open_source(url)
    return [(item.data, item.label, "" if item.text_is_class else item.text) for item in source.read(0, len(source))]


LAYOUTS: dict[str, tuple[str, Callable[[Path], None], list[str]]] = {}  # builder, function that writes it, splits
# Of these datasets reads the files in the order of a set, or the splits one after the other.
WITHOUT_ORDER = {"metadata_in_folders"}


def layout(builder: str, splits: list[str] | None = None):
    def register(function: Callable[[Path], None]) -> Callable[[Path], None]:
        LAYOUTS[function.__name__] = (builder, function, splits or ["train"])
        return function

    return register


@layout("imagefolder")
def flat(folder):
    put(folder, {f"{row}.jpg": IMAGES[row] for row in range(4)})


@layout("imagefolder")
def classes(folder):
    put(folder, {f"{name}/{row}.jpg": IMAGES[row] for row, name in enumerate(["dog", "cat", "dog", "owl"])})


@layout("imagefolder")
def one_class(folder):
    put(folder, {f"dog/{row}.jpg": IMAGES[row] for row in range(3)})


@layout("imagefolder")
def nested_folders_of_one_depth(folder):
    put(folder, {f"a/{name}/{row}.jpg": IMAGES[row] for row, name in enumerate(["x", "y", "x"])})


@layout("imagefolder")
def nested_folders_of_different_depths(folder):
    put(folder, {"cat/0.png": IMAGES[0], "dogs/small/1.png": IMAGES[1], "dogs/big/2.png": IMAGES[2]})


@layout("imagefolder")
def names_that_sort_by_letter_and_number(folder):
    names = ["10.jpg", "9.jpg", "B.jpg", "a.jpg", "é.jpg", "a b.jpg"]
    put(folder, dict(zip(names, IMAGES, strict=True)))


@layout("imagefolder")
def upper_case_and_rare_suffixes(folder):
    suffixes = ["JPG", "Png", "bmp", "tiff", "ppm", "jp2"]
    put(folder, {f"{row}.{end}": noise_image(row, f".{end.lower()}") for row, end in enumerate(suffixes)})


@layout("imagefolder")
def other_files_beside_images(folder):
    put(folder, {"0.jpg": IMAGES[0], "README.md": "# images", "notes.json": "{}", "Thumbs.db": b"\0\1"})


@layout("imagefolder")
def hidden_files(folder):
    put(folder, {"0.jpg": IMAGES[0], ".hidden.jpg": IMAGES[1], ".cache/1.jpg": IMAGES[2]})


@layout("imagefolder", ["train", "test"])
def splits_with_classes(folder):
    names = ["train/dog/0.jpg", "train/cat/1.jpg", "test/dog/2.jpg", "test/cat/3.jpg"]
    put(folder, dict(zip(names, IMAGES, strict=False)))


@layout("imagefolder")
def metadata_jsonl(folder):
    rows = [{"file_name": f"{row}.jpg", "text": f"caption {row}"} for row in (2, 0, 1)]
    put(folder, {f"{row}.jpg": IMAGES[row] for row in range(3)} | {"metadata.jsonl": jsonl(*rows)})


@layout("imagefolder")
def metadata_csv_with_labels(folder):
    lines = 'file_name,label,text\n1.jpg,3,one\n0.jpg,4,"zero, with a comma"\n'
    put(folder, {f"{row}.jpg": IMAGES[row] for row in range(2)} | {"metadata.csv": lines})


@layout("imagefolder")
def metadata_csv_of_windows(folder):
    lines = '\ufefffile_name,text\r\n1.jpg,one\r\n0.jpg,"two\nlines"\r\n'
    put(folder, {f"{row}.jpg": IMAGES[row] for row in range(2)} | {"metadata.csv": lines.encode()})


@layout("imagefolder")
def metadata_parquet(folder):
    put(folder, {f"images/{row}.jpg": IMAGES[row] for row in range(3)})
    parquet(folder, "metadata.parquet", file_name=["images/2.jpg", "images/1.jpg"], text=["two", None])


@layout("imagefolder")
def metadata_of_some_images_and_one_twice(folder):
    rows = [{"file_name": f"{row}.jpg", "text": f"caption {place}"} for place, row in enumerate((2, 0, 2))]
    put(folder, {f"{row}.jpg": IMAGES[row] for row in range(4)} | {"metadata.jsonl": jsonl(*rows)})


@layout("imagefolder")
def metadata_with_a_second_image(folder):
    row = {"mask_file_name": "mask.jpg", "file_name": "0.jpg", "text": "with a mask"}
    put(folder, {"0.jpg": IMAGES[0], "mask.jpg": IMAGES[1], "metadata.jsonl": jsonl(row)})


@layout("imagefolder")
def metadata_in_folders(folder):
    for name in ("a", "b"):
        rows = [{"file_name": f"x/{row}.jpg", "text": f"{name} {row}"} for row in range(2)]
        put(folder / name, {f"x/{row}.jpg": IMAGES[row] for row in range(2)} | {"metadata.jsonl": jsonl(*rows)})


@layout("imagefolder", ["train", "test"])
def metadata_by_split(folder):
    for place, split in enumerate(("train", "test")):
        rows = [{"file_name": f"{row}.jpg", "text": f"{split} {row}"} for row in range(2)]
        files = {f"{row}.jpg": IMAGES[row + 2 * place] for row in range(2)}
        put(folder / split, files | {"metadata.jsonl": jsonl(*rows)})


@layout("parquet")
def parquet_struct(folder):
    parquet(folder, image=images(0, 1, 2), text=["a", "b", None], label=[1, 0, 2])


@layout("parquet")
def parquet_several_files_and_row_groups(folder):
    for name, rows in (("b", (3, 4)), ("a", (0, 1, 2)), ("c", (5,))):
        table = pa.table({"image": images(*rows), "text": [f"t{row}" for row in rows]})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=2)


@layout("parquet")
def parquet_large_and_dictionary_types(folder):
    kind = pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])
    texts = pa.array(["a", "b", "a"]).dictionary_encode()
    parquet(folder, image=pa.array(images(0, 1, 2), kind), text=texts, label=pa.array([3, 2, 1], pa.uint8()))


@layout("parquet")
def parquet_with_null_images(folder):
    parquet(folder, image=[images(0)[0], None, images(1)[0]], text=["x", "y", "z"])


@layout("parquet", ["train", "test"])
def parquet_by_split(folder):
    parquet(folder, "data/train-00000-of-00001.parquet", image=images(0, 1), text=["a", "b"])
    parquet(folder, "data/test-00000-of-00001.parquet", image=images(2), text=["c"])


@layout("webdataset")
def tar_plain(folder):
    members = {f"{row:03d}.{end}": content for row in range(3) for end, content in _fields(row, "jpg", "txt", "cls")}
    write_tar(folder / "00000.tar", members)


@layout("webdataset")
def tar_json(folder):
    members = {f"{row}.{end}": content for row in range(3) for end, content in _fields(row, "jpg", "json")}
    write_tar(folder / "00000.tar", members)


@layout("webdataset")
def tar_with_folders_and_dots(folder):
    members = {f"./v1.0/a.b/{row}.{end}": content for row in range(2) for end, content in _fields(row, "jpg", "txt")}
    write_tar(folder / "00000.tar", members)


@layout("webdataset")
def tar_named_fields(folder):
    members = {}
    for row in range(2):
        members |= {f"{row}.image.jpg": IMAGES[row], f"{row}.label.cls": f"{row}", f"{row}.text.txt": f"text {row}"}
    write_tar(folder / "00000.tar", members)


@layout("webdataset")
def tars_in_order(folder):
    for name in ("b", "a", "c-10", "c-9"):
        write_tar(folder / f"{name}.tar", {"0.jpg": IMAGES[len(name)], "0.txt": name})


@layout("webdataset")
def tar_of_long_names_by_pax(folder):
    name = "folder/" * 30 + "é" * 60
    write_tar(folder / "0.tar", {f"{name}.jpg": IMAGES[0], f"{name}.txt": "x"}, format=1)


@layout("webdataset")
def tar_of_long_names_by_gnu(folder):
    name = "folder/" * 30 + "a" * 120
    write_tar(folder / "0.tar", {f"{name}.jpg": IMAGES[0], f"{name}.txt": "x"}, format=1)


@layout("webdataset")
def tar_upper_case_suffixes(folder):
    write_tar(folder / "0.tar", {"0.JPG": IMAGES[0], "1.JPG": IMAGES[1]})


@layout("webdataset")
def tar_hidden_and_other_members(folder):
    write_tar(folder / "0.tar", {"._0.jpg": b"x", "0.jpg": IMAGES[0], "0.txt": "t", "README": "none"})


@layout("webdataset")
def tar_of_one_key_in_two_archives(folder):
    for name, row in (("part-1", 0), ("part-2", 1)):
        write_tar(folder / f"{name}.tar", {"0.jpg": IMAGES[row], "0.txt": name})


@layout("webdataset", ["train", "validation"])
def tars_by_split(folder):
    write_tar(folder / "train/0.tar", {"0.jpg": IMAGES[0], "0.txt": "train"})
    write_tar(folder / "val/0.tar", {"0.jpg": IMAGES[1], "0.txt": "val"})


def _fields(row: int, *ends: str):
    contents = {"jpg": IMAGES[row], "txt": f"text {row}", "cls": f"{row + 3}", "json": f'{{"caption": "text {row}"}}'}
    return [(end, contents[end]) for end in ends]


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_are_those_of_datasets(datasets, tmp_path, name):
    builder, make, splits = LAYOUTS[name]
    folder = tmp_path / "source"
    folder.mkdir()
    make(folder)
    expected = rows_of_datasets(datasets, folder, tmp_path / "cache", builder, splits)
    assert len(expected) > 0
    actual = rows_of_ours(f"{folder}")
    if len(splits) > 1 or name in WITHOUT_ORDER:
        actual, expected = sorted(actual), sorted(expected)
    assert actual == expected


def test_at_least_30_layouts():
    assert len(LAYOUTS) >= 30


def test_a_parquet_file_without_rows_is_passed_over(tmp_path):
    """Versions of datasets fail for it."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), ("text", pa.string())])
    parquet(tmp_path, "a.parquet", schema, image=[], text=[])
    parquet(tmp_path, "b.parquet", schema, image=images(0, 1), text=["x", "y"])
    assert rows_of_ours(f"{tmp_path}") == [(IMAGES[0], -1, "x"), (IMAGES[1], -1, "y")]
