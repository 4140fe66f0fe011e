"""Rows, labels and captions of the sources of the cases; the kinds are also made in `tests/pixart/data/sources`."""

import dataclasses
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from jobs.submission.preflight import check_contents
from jobs.tasks import init_dataset
from pixart.config.recipe import to_json
from pixart.data.sources.open import open_source
from pixart.recipes import demo
from tests.pixart.data.sources.test_sources import noise_image, write
from tests.pixart.data.sources.test_world import items_of, part_of, write_tar

NO_WORDS = (False, "no words", "", -1)


def valid(caption: str, label: int = -1) -> tuple[bool, str, str, int]:
    return True, "", caption, label


FINE = valid("a fine caption")
# (valid, reason, caption, label) of every row, as data.captioner=labels stores it, and what is left out by reason.
EXPECTED: dict[str, tuple[list[Any], dict[str, int]]] = {
    "parquet_text_null_caption_set": (
        [
            valid("a long caption of the first"),
            valid("short alt text here"),
            valid("third caption is long"),
            valid("fourth caption long"),
        ],
        {},
    ),
    "parquet_columns_in_later_file": (
        [NO_WORDS, NO_WORDS, valid("a caption of three", 1), valid("a caption of four", 2)],
        {},
    ),
    "tar_bad_json": ([(False, "unreadable text", "", -1), FINE], {}),
    "tar_cls_name": ([(False, "unreadable label", "", -1)] * 2, {}),
    "tar_latin1_caption": ([valid("caf\ufffd \ufffd c\ufffdt\ufffd"), FINE], {}),
    "tar_surrogate": ([valid("a smile \ufffd"), FINE], {}),
    "tar_latin1_names": ([NO_WORDS] * 2, {}),
    "tar_dots": ([valid("a caption of one"), valid("a caption of plain")], {}),
    "tar_hf_to_wds": ([valid("a caption", 3), valid("other caption", 4)], {}),
    "tar_links": ([NO_WORDS] * 3, {"symbolic link": 1}),
    "folder_metadata_jsonl": ([valid(f"a photo with the number {row} in it") for row in range(3)], {}),
    "folder_stray_root_image": (
        [
            *[valid("a photo of a cat", 0)] * 2,
            NO_WORDS,
            *[valid("a photo of a dog", 1)] * 2,
            *[valid("a photo of an owl", 2)] * 2,
        ],
        {},
    ),
    "folder_other_suffixes": ([NO_WORDS] * 8, {}),
    "png_large_metadata": ([NO_WORDS] * 2, {}),
    "commoncatalog": ([valid(f"a photo {row}") for row in range(12)], {}),
    "commoncatalog_nested": ([valid(f"a photo {row}") for row in range(12)], {}),
    "imagenet21k_tars": ([valid(f"a photo of a n0144{end}", row) for row, end in enumerate(("0764", "3537"))], {}),
    "sa1b_tar": ([NO_WORDS] * 12, {}),
}
REPEATED = {"imagenet21k_tars": 6}  # rows of the same class


@pytest.fixture(scope="module")
def sources(shared_data: Path) -> Path:
    folder = shared_data.parent / "cases/sources"
    if not folder.is_dir():
        pytest.skip(f"the cases are not at {folder}")
    return folder


@pytest.mark.parametrize("name", EXPECTED)
def test_rows(sources, name):
    rows, left_out = EXPECTED[name]
    expected = [row for row in rows for _ in range(REPEATED.get(name, 1))]
    assert part_of(sources / name) == expected
    contents = open_source(f"{sources / name}").contents()
    assert contents.left_out == left_out
    assert contents.items == len(expected)
    assert contents.largest_label == max(label for *_, label in expected)


CHOSEN = {"parquet_list_captions": {"a first caption", "a second one"}}
CHOSEN["tar_caption_list"] = {"one dog runs", "a dog is running"}


@pytest.mark.parametrize("name", CHOSEN)
def test_one_caption_of_several(sources, name):
    first = [items_of(sources / name, seed=seed)[0].text for seed in range(16)]
    assert set(first) == CHOSEN[name]
    assert first == [items_of(sources / name, seed=seed)[0].text for seed in range(16)]


@pytest.mark.parametrize("name", ["parquet_path_only"])
def test_paths(sources, tmp_path, name):
    """Without the images the source is refused; with them, they are read relative to the file."""
    with pytest.raises(ValueError, match=r"holds paths and no images, and image images/0\.jpg is missing"):
        open_source(f"{sources / name}")
    shutil.copytree(sources / name, tmp_path / name)
    rows = len(items_with_images(tmp_path / name))
    assert rows > 0


def items_with_images(folder: Path) -> list[Any]:
    for row in range(12):
        write(f"{folder}/images/{row}.jpg", noise_image(row))
    items = items_of(folder)
    assert [item.data for item in items] == [noise_image(row) for row in range(len(items))]
    return items


@pytest.mark.parametrize("name", ["img2dataset_files"])
def test_files_of_img2dataset(sources, name):
    items = items_of(sources / name)
    assert [item.text for item in items] == [
        path.with_suffix(".txt").read_text().strip() for path in sorted((sources / name).glob("*/*.jpg"))
    ]
    contents = open_source(f"{sources / name}").contents()
    assert (contents.items, contents.left_out) == (8, {"suffix .json": 2, "suffix .parquet": 2})


@pytest.mark.parametrize("name", ["imagenet21k_id_class"])
def test_wordnet_ids_and_glosses(sources, name):
    source = open_source(f"{sources / name}")
    items = list(source.read(0, 99))
    assert len({item.label for item in items}) == len(source.class_names) == 12
    assert all(item.text == source.class_names[item.label] and item.text_is_class for item in items)


@pytest.mark.parametrize("name", ["a folder with `up -> ..` or `a -> .`"])
def test_links_in_a_circle(tmp_path, name):
    for link, target in (("up", ".."), ("a", ".")):
        folder = tmp_path / link
        for row in range(2):
            write(f"{folder}/images/{row}.jpg", noise_image(row))
        (folder / "images" / link).symlink_to(target)
        source = open_source(f"{folder}/images")
        assert [item.id for item in source.read(0, 99)] == ["0.jpg", "1.jpg"]
        assert source.contents().left_out == {"link to a folder that contains it": 1}


@pytest.mark.parametrize("name", ["a tar whose member has a negative size"])
def test_negative_size(tmp_path, name):
    write_tar(tmp_path / "0.tar", {"0.jpg": noise_image(0), "1.jpg": noise_image(1)})
    info = tarfile.TarInfo("1.jpg")
    info.size = -1536
    with (tmp_path / "0.tar").open("r+b") as file:
        file.seek(512 + 512 * -(-len(noise_image(0)) // 512))
        file.write(info.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(ValueError, match=r"0\.tar is not a complete tar file"):
        open_source(f"{tmp_path}")


@pytest.mark.parametrize("name", ["`.cls` 5000 with `num_classes` 1001"])
def test_a_label_out_of_range(tmp_path, name):
    write_tar(
        tmp_path / "images/0.tar", {"0.jpg": noise_image(0), "0.cls": "3", "1.jpg": noise_image(1), "1.cls": "5000"}
    )
    recipe = demo(f"{tmp_path}")
    data = dataclasses.replace(recipe.data, source=f"{tmp_path}/images", max_images=None, num_shards=1)
    recipe = dataclasses.replace(recipe, data=data, model=dataclasses.replace(recipe.model, num_classes=1001))
    init_dataset.run(to_json(recipe))
    with pytest.raises(ValueError, match=r"^model\.num_classes=1001: the largest label .* is 5000.*num_classes=5002"):
        check_contents(recipe, 1, None)
