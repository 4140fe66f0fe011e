"""Folders and single images as other tools write them; see `test_world`."""

import csv
import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pixart.data.sources.open import open_source
from tests.pixart.data.sources.test_sources import noise_image, write
from tests.pixart.data.sources.test_world import CASES, cases, items_of, part_of, write_tar

__all__ = ["cases"]
ROWS = [{"file_name": f"{row:04d}.jpg", "text": f"a photo with the number {row} in it"} for row in range(3)]


def write_metadata(folder, kind: str, rows: list[dict]) -> None:
    if kind == "jsonl":
        (folder / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    elif kind == "csv":
        with (folder / "metadata.csv").open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        pq.write_table(pa.Table.from_pylist(rows), folder / "metadata.parquet")


def test_metadata_has_the_captions(cases):
    def make(folder):
        for row in ROWS:
            write(f"{folder}/{row['file_name']}", noise_image(1))
        write_metadata(folder, "jsonl", ROWS)

    items = items_of(cases("folder_metadata_jsonl", make))
    assert [(item.id, item.text, item.label) for item in items] == [(row["file_name"], row["text"], -1) for row in ROWS]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize(
    ("labels", "expected", "names"), [((1, 0, 1), [1, 0, 1], []), (("b", "a", "b"), [1, 0, 1], ["a", "b"])]
)
def test_metadata_of_every_kind_with_labels_and_other_rows(tmp_path, kind, labels, expected, names):
    rows = [{"file_name": f"images/{row}.jpg", "caption": f"caption {row}", "label": labels[row]} for row in range(3)]
    for row in rows:
        write(f"{tmp_path}/train/{row['file_name']}", noise_image(1))
    write(f"{tmp_path}/train/images/9.jpg", noise_image(1))
    write_metadata(tmp_path / "train", kind, [*rows, {**rows[0], "file_name": "missing.jpg"}])
    source = open_source(f"{tmp_path}")
    assert [(item.text, item.label) for item in source.read(0, 9)] == [
        (row["caption"], label) for row, label in zip(rows, expected, strict=True)
    ]
    assert source.class_names == names
    left_out = {"row of metadata without its image": 1, "image without a row of metadata": 1}
    assert source.contents().left_out == left_out


def test_a_damaged_line_of_metadata_is_left_out(tmp_path):
    write(f"{tmp_path}/0000.jpg", noise_image(1))
    lines = ['{"file_name": "00', "[]", json.dumps({**ROWS[0], "label": [1]}), '{"file_name": "../other.jpg"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    source = open_source(f"{tmp_path}")
    assert [item.text for item in source.read(0, 9)] == [ROWS[0]["text"]]
    assert source.contents().left_out == {
        "damaged line of metadata": 2,
        "label of metadata that is no integer or word": 1,
        "row of metadata without its image": 1,
    }
    (tmp_path / "metadata.csv").touch()
    with pytest.raises(ValueError, match=r"metadata files of different kinds \(.csv, .jsonl\)"):
        open_source(f"{tmp_path}")
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text(f'file_name,text\n0000.jpg,"{"x" * 200_000}\n')
    with pytest.raises(ValueError, match=r"metadata\.csv cannot be read: field larger than field limit"):
        open_source(f"{tmp_path}")


def test_an_image_beside_the_class_folders_has_no_class(cases):
    def make(folder):
        write(f"{folder}/contact_sheet.png", noise_image(0, ".png"))
        for name in ("owl", "cat", "dog"):
            for image in "ab":
                write(f"{folder}/{name}/{image}.jpg", noise_image(1))

    source = open_source(f"{cases('folder_stray_root_image', make)}")
    labels = {item.id: item.label for item in source.read(0, 9)}
    assert source.class_names == ["cat", "dog", "owl"]
    assert labels.pop("contact_sheet.png") == -1
    assert labels == {f"{name}/{image}.jpg": label for label, name in enumerate(source.class_names) for image in "ab"}
    assert (source.contents().items, source.contents().labelled) == (7, 6)


def test_folders_at_different_depths_are_no_classes(tmp_path):
    """As in datasets; an image beside the folders and folders of splits do not count."""
    for name in ("0.jpg", "train/cat/1.jpg", "dog/2.jpg"):
        write(f"{tmp_path}/even/{name}", noise_image(1))
    assert open_source(f"{tmp_path}/even").class_names == ["cat", "dog"]
    for name in ("cat/1.jpg", "dogs/small/2.jpg", "dogs/big/3.jpg"):
        write(f"{tmp_path}/uneven/{name}", noise_image(1))
    source = open_source(f"{tmp_path}/uneven")
    assert [item.label for item in source.read(0, 9)] == [-1, -1, -1]
    assert source.contents().left_out == {"folders as classes, because they are at different depths": 3}


def test_split_folders_are_no_classes(tmp_path):
    for split in ("train", "test"):
        write(f"{tmp_path}/flat/{split}/0.jpg", noise_image(1))
        for name in ("cat", "dog"):
            write(f"{tmp_path}/classes/{split}/{name}/0.jpg", noise_image(1))
    assert open_source(f"{tmp_path}/flat").class_names == []
    assert open_source(f"{tmp_path}/classes").class_names == ["cat", "dog"]
    assert [item.label for item in items_of(tmp_path / "classes")] == [0, 1, 0, 1]


def test_images_of_other_suffixes_are_taken(cases):
    names = ["a.jpg", "b.jfif", "c.bmp", "d.tif", "e.gif", "f.avif", "g", "h.JPE"]

    def make(folder):
        for name in names:
            suffix = f".{name.partition('.')[2].lower() or 'jpg'}"
            write(f"{folder}/{name}", noise_image(1, suffix))

    source = cases("folder_other_suffixes", make)
    assert [item.id for item in items_of(source)] == names
    assert [row[1] for row in part_of(source)] == ["no words"] * 8


def test_other_files_are_counted(tmp_path):
    for name in ("a.jpg", "a.txt", "b.dat", "c", "d.heic", "e.pdf", "f.txt"):
        write(f"{tmp_path}/{name}", noise_image(1) if name == "a.jpg" else b"no image")
    write(f"{tmp_path}/photo.orig", noise_image(2))
    source = open_source(f"{tmp_path}")
    assert [item.id for item in source.read(0, 9)] == ["a.jpg", "photo.orig"]
    expected = dict.fromkeys(("suffix .dat", "no suffix", "suffix .heic", "suffix .pdf", "suffix .txt"), 1)
    assert source.contents().left_out == expected


def test_files_of_img2dataset(cases):
    def make(folder):
        for key in ("000000", "000001"):
            write(f"{folder}/00000/{key}.jpg", noise_image(1))
            write(f"{folder}/00000/{key}.txt", f"text {key}".encode())
            write(f"{folder}/00000/{key}.json", json.dumps({"caption": f"text {key}", "key": key}).encode())
        pq.write_table(pa.table({"url": ["a", "b"], "key": ["000000", "000001"]}), folder / "00000.parquet")
        write(f"{folder}/00000_stats.json", b"{}")

    folder = cases("img2dataset_files", make)
    source = open_source(f"{folder}")
    items = list(source.read(0, 99))
    assert source.class_names == []
    assert len(items) == len(list(folder.glob("*/*.jpg")))
    for item in items:
        assert item.text == (folder / item.id).with_suffix(".txt").read_text().strip()
    assert source.contents().has_words


def test_captions_of_json_sidecars_and_one_that_is_damaged(tmp_path):
    for name, sidecar in (("a", '{"caption": ["one", "two"]}'), ("b", '{"caption'), ("c", '{"text": "\\ud83d"}')):
        write(f"{tmp_path}/{name}.jpg", noise_image(1))
        write(f"{tmp_path}/{name}.json", sidecar.encode())
    assert {items_of(tmp_path, seed=seed)[0].text for seed in range(16)} == {"one", "two"}
    assert [row[:3] for row in part_of(tmp_path)[1:]] == [(False, "unreadable text", ""), (True, "", "\ufffd")]


@pytest.mark.parametrize("links", [{"up": ".."}, {"a": "."}, {"a": ".", "b": "."}, {"c/x": "../d", "d/x": "../c"}])
def test_circular_links(tmp_path, links):
    for name in ("c/0.jpg", "d/1.jpg"):
        write(f"{tmp_path}/images/{name}", noise_image(1))
    write(f"{tmp_path}/other/2.jpg", noise_image(1))
    for name, target in links.items():
        (tmp_path / "images" / name).symlink_to(target)
    source = open_source(f"{tmp_path}/images")
    assert [item.id for item in source.read(0, 99)] == ["c/0.jpg", "d/1.jpg"]
    assert sum(source.contents().left_out.values()) == len(links)


def test_broken_links_and_pipes_are_counted(tmp_path):
    write(f"{tmp_path}/a.jpg", noise_image(1))
    (tmp_path / "c.jpg").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "d.jpg")
    assert open_source(f"{tmp_path}").contents().left_out == {"broken link": 2, "pipe or device": 1}


def test_large_metadata_of_complete_png_files(cases):
    from PIL.PngImagePlugin import PngInfo

    def make(folder):
        folder.mkdir()
        info = PngInfo()
        info.add_text("comment", os.urandom(1_600_000).hex(), zip=True)
        image = Image.open(io.BytesIO(noise_image(1, side=64)))
        image.save(folder / "a.png", pnginfo=info)
        image.save(folder / "b.png", icc_profile=os.urandom(2_000_000))

    assert [row[1] for row in part_of(cases("png_large_metadata", make))] == ["no words"] * 2


def test_shared_cases_are_all_tested():
    if not CASES.is_dir():
        pytest.skip(f"the cases are not at {CASES}")
    import tests.pixart.data.sources as folder

    paths = sorted(Path(folder.__path__[0]).glob("test_world*.py"))
    texts = "".join(path.read_text() for path in paths)
    assert [case.name for case in CASES.iterdir() if case.name not in texts] == []


def test_files_of_a_download_cache_are_links(tmp_path):
    """A snapshot of a hub repository consists of links to files outside of it."""
    write(f"{tmp_path}/blobs/abc", noise_image(1))
    (tmp_path / "snapshot/cat").mkdir(parents=True)
    (tmp_path / "snapshot/cat/0.jpg").symlink_to("../../blobs/abc")
    (tmp_path / "snapshot/more").symlink_to("../blobs")
    assert [item.id for item in items_of(tmp_path / "snapshot")] == ["cat/0.jpg", "more/abc"]


def test_tars_of_img2dataset_with_their_tables(tmp_path):
    write_tar(tmp_path / "00000.tar", {"000000000.jpg": noise_image(1), "000000000.txt": "a caption"})
    pq.write_table(pa.table({"url": ["a"], "key": ["000000000"]}), tmp_path / "00000.parquet")
    write(f"{tmp_path}/00000_stats.json", b"{}")
    assert [item.text for item in items_of(tmp_path)] == ["a caption"]


def test_a_tar_that_has_changed_since_it_was_counted_is_refused(tmp_path):
    counts_file = tmp_path / "dataset/source-files.json"
    write_tar(tmp_path / "tars/0.tar", {"0.jpg": noise_image(1)})
    size = (tmp_path / "tars/0.tar").stat().st_size
    open_source(f"{tmp_path}/tars", counts_file=counts_file)
    counts_file.write_text(json.dumps({"0.tar": [size, 2]}))
    with pytest.raises(ValueError, match=r"0\.tar has 1 items, but had 2 when they were counted"):
        list(open_source(f"{tmp_path}/tars", counts_file=counts_file).read(0, 2))
