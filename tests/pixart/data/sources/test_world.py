"""Sources as other tools write them. Each kind is made here, and read from the shared cases where these are present."""

import io
import json
import tarfile
from pathlib import Path

import pytest

from pixart.config.dataset import ScreeningConfig
from pixart.data.captions.captioner import make_captioner
from pixart.data.captions.table import make_part
from pixart.data.sources.open import open_source
from tests.pixart.data.sources.test_sources import noise_image

CASES = Path(__file__).parents[4] / "../shared/cases/sources"
LIMITS = ScreeningConfig(min_side=8)


def items_of(url, **options):
    source = open_source(f"{url}", **options)
    items = list(source.read(0, len(source)))
    assert len(items) == len(source)
    return items


def part_of(url, **options):
    """Return (valid, reason, caption, label) of every row, as `caption` with data.captioner=labels stores them."""
    source = open_source(f"{url}", **options)
    table = make_part(source.read(0, len(source)), make_captioner("labels", model=""), LIMITS)
    assert len(table) == len(source)
    return [(row["valid"], row["reason"], row["caption"], row["label"]) for row in table.to_pylist()]


def write_tar(path: Path, members: dict[str, bytes | str], **options) -> None:
    """Write a tar of named contents; a text is written in UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


A, B, C = noise_image(1), noise_image(2), noise_image(3)
FINE = {"0002.jpg": B, "0002.txt": "a fine caption"}
TARS: dict[str, dict[str, bytes | str]] = {
    "tar_bad_json": {"0001.jpg": A, "0001.json": '{"caption": "cut', **FINE},
    "tar_caption_list": {"0001.jpg": A, "0001.json": json.dumps({"caption": ["one dog runs", "a dog is running"]})}
    | FINE,
    "tar_cls_name": {"0001.jpg": A, "0001.cls": "n01440764", "0002.jpg": B, "0002.cls": "n01443537"},
    "tar_latin1_caption": {"0001.jpg": A, "0001.txt": "café à côté".encode("latin-1"), **FINE},
    "tar_surrogate": {"0001.jpg": A, "0001.json": r'{"caption": "a smile \ud83d"}', **FINE},
    "tar_dots": {
        "IMG.2024.01.jpg": A,
        "IMG.2024.01.txt": "a caption of one",
        "plain.jpg": B,
        "plain.txt": "a caption of plain",
    },
    "tar_hf_to_wds": {"0.image.jpg": A, "0.label.cls": "3", "0.text.txt": "a caption"}
    | {"1.image.jpg": B, "1.label.cls": "4", "1.text.txt": "other caption"},
    "sa1b_tar": {f"./sa_{row}.{end}": A if end == "jpg" else "{}" for row in range(12) for end in ("jpg", "json")},
}
EXPECTED = {
    "tar_bad_json": [(False, "unreadable text", "", -1), (True, "", "a fine caption", -1)],
    "tar_cls_name": [(False, "unreadable label", "", -1)] * 2,
    "tar_latin1_caption": [(True, "", "caf\ufffd \ufffd c\ufffdt\ufffd", -1), (True, "", "a fine caption", -1)],
    "tar_surrogate": [(True, "", "a smile \ufffd", -1), (True, "", "a fine caption", -1)],
    "tar_dots": [(True, "", "a caption of one", -1), (True, "", "a caption of plain", -1)],
    "tar_hf_to_wds": [(True, "", "a caption", 3), (True, "", "other caption", 4)],
    "sa1b_tar": [(False, "no words", "", -1)] * 12,
}


@pytest.fixture(params=["made", "shared"])
def cases(request, tmp_path):
    """Return a function that returns the source of a name: `make(folder)`'s, or the shared one."""
    if request.param == "shared" and not CASES.is_dir():
        pytest.skip(f"the cases are not at {CASES}")

    def source(name: str, make) -> Path:
        if request.param == "shared":
            return CASES / name
        make(tmp_path / name)
        return tmp_path / name

    return source


@pytest.mark.parametrize("name", EXPECTED)
def test_rows_of_a_tar(cases, name):
    assert part_of(cases(name, lambda folder: write_tar(folder / "00000.tar", TARS[name]))) == EXPECTED[name]


def test_one_caption_of_a_list_is_chosen_by_seed_and_row(cases):
    source = cases("tar_caption_list", lambda folder: write_tar(folder / "00000.tar", TARS["tar_caption_list"]))
    chosen = [items_of(source, seed=seed)[0].text for seed in range(16)]
    assert chosen == [items_of(source, seed=seed)[0].text for seed in range(16)]
    assert set(chosen) == {"one dog runs", "a dog is running"}
    assert items_of(source)[1].text == "a fine caption"


def test_names_that_are_not_utf8_are_read_and_stored(cases):
    def make(folder):
        write_tar(folder / "00000.tar", {"caf\udce9_1.jpg": A, "plain.jpg": B, "plain.txt": "plain"})

    source = cases("tar_latin1_names", make)
    assert [item.id for item in items_of(source)] == [r"00000.tar:caf\xe9_1", "00000.tar:plain"]
    assert part_of(source)[0][:2] == (False, "no words")


def test_hard_links_are_read_and_symbolic_links_counted(cases):
    def make(folder):
        write_tar(folder / "00000.tar", {"a/1.jpg": A, "c/2.jpg": B})
        with tarfile.open(folder / "00000.tar", "a") as tar:
            for name, kind, target in (("b/1.jpg", tarfile.LNKTYPE, "a/1.jpg"), ("c/1.jpg", tarfile.SYMTYPE, "../a")):
                info = tarfile.TarInfo(name)
                info.type, info.linkname = kind, target
                tar.addfile(info)

    source = open_source(f"{cases('tar_links', make)}")
    data = {item.id.partition(":")[2]: item.data for item in source.read(0, 9)}
    assert set(data) == {"a/1", "b/1", "c/2"}
    assert data["a/1"] == data["b/1"] != data["c/2"]
    assert source.contents().left_out == {"symbolic link": 1}


def test_a_tar_without_words_says_so(cases):
    source = cases("sa1b_tar", lambda folder: write_tar(folder / "sa_000000.tar", TARS["sa1b_tar"]))
    counts = open_source(f"{source}").contents()
    assert (counts.items, counts.has_words, counts.largest_label) == (12, False, -1)


def test_tars_that_are_named_by_their_class(cases):
    def make(folder):
        for name in ("n01440764", "n01443537"):
            write_tar(folder / f"{name}.tar", {f"{name}_{row}.JPEG": noise_image(row) for row in range(6)})

    source = open_source(f"{cases('imagenet21k_tars', make)}")
    assert source.class_names == ["n01440764", "n01443537"]
    assert [item.label for item in source.read(0, 12)] == [0] * 6 + [1] * 6
    assert source.contents().largest_label == 1


def test_tars_of_words_are_classes_and_those_of_splits_and_numbers_are_not(tmp_path):
    for names, classes in ((("cat", "dog"), ["cat", "dog"]), (("train", "test"), []), (("a-1", "a-2"), [])):
        folder = tmp_path / names[0]
        for name in names:
            write_tar(folder / f"{name}.tar", {"0.jpg": A})
        assert open_source(f"{folder}").class_names == classes


def test_several_archives_in_one_file(tmp_path):
    write_tar(tmp_path / "a", {"0.jpg": A})
    write_tar(tmp_path / "b", {"1.jpg": B, "1.txt": b"\xef\xbb\xbfwith a byte order mark"})
    (tmp_path / "joined").mkdir()
    joined = (tmp_path / "a").read_bytes() + (tmp_path / "b").read_bytes()
    (tmp_path / "joined/0.tar").write_bytes(joined)
    assert [(item.data, item.text) for item in items_of(tmp_path / "joined")] == [
        (A, ""),
        (B, "with a byte order mark"),
    ]
    (tmp_path / "joined/0.tar").write_bytes(joined + b"other bytes" * 100)
    assert len(items_of(tmp_path / "joined")) == 2


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
@pytest.mark.parametrize("size", [-512, -1536, -(2**40)])
def test_a_member_of_negative_size_is_refused(tmp_path, size, kind):
    write_tar(tmp_path / "0.tar", {"0.jpg": A, "1.jpg": B})
    info = tarfile.TarInfo("bad.jpg")
    info.size, info.type = size, kind
    with (tmp_path / "0.tar").open("r+b") as file:
        file.seek(512 + 512 * -(-len(A) // 512))  # the second member's header
        file.write(info.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(ValueError, match=r"0\.tar is not a complete tar file"):
        open_source(f"{tmp_path}")


@pytest.mark.parametrize(
    ("sidecar", "problem"),
    [
        ('{"caption": 3}', "its caption is int 3, not a text"),
        ("[1]", "its JSON is not an object"),
        ("[" * 100_000, "its JSON cannot be read"),
        (b"\xff\xfe\xff", "its JSON cannot be read"),
    ],
)
def test_a_sidecar_that_cannot_be_read_is_a_problem_of_its_row(tmp_path, sidecar, problem):
    write_tar(tmp_path / "0.tar", {"0.jpg": A, "0.json": sidecar, "1.jpg": B, "1.txt": "fine".encode("utf-16")})
    bad, good = items_of(tmp_path)
    assert problem in bad.text_problem
    assert (good.text, good.text_problem) == ("fine", "")


@pytest.mark.parametrize(
    ("caption", "text", "problem"),
    [
        ({"de": "ein Hund", "en": "a dog"}, "a dog", ""),
        ({"de": "ein Hund", "en-US": "a dog", "zh-Hans-CN": "狗"}, "a dog", ""),
        ({"fr": "un chien", "de": None}, "un chien", ""),
        ({"language": ["de", "en"], "translation": ["ein Hund", "a dog"]}, "a dog", ""),
        ({"en": ["a dog", "a dog"], "de": ["ein Hund"]}, "a dog", ""),
        ({"de": None, "en": ""}, "", ""),
        ({"quality": 3, "source": "web"}, "", "its caption is an object with the keys quality, source"),
    ],
)
def test_captions_by_language(tmp_path, caption, text, problem):
    write_tar(tmp_path / "0.tar", {"0.jpg": A, "0.json": json.dumps({"caption": caption})})
    (item,) = items_of(tmp_path)
    assert (item.text, item.text_problem[: len(problem)]) == (text, problem)
    assert bool(item.text_problem) == bool(problem)


def test_a_word_as_label_in_json_is_reported_and_its_words_are_used(tmp_path):
    records = [{"label": "brown_bear"}, {"label": "acorn", "caption": "an acorn lies here"}, {"label": 3}]
    members: dict[str, bytes | str] = {}
    for row, record in enumerate(records):
        members |= {f"{row}.jpg": A, f"{row}.json": json.dumps(record)}
    write_tar(tmp_path / "0.tar", members)
    assert [(item.text, item.text_is_class, item.label) for item in items_of(tmp_path)] == [
        ("brown bear", True, -1),
        ("an acorn lies here", False, -1),
        ("", False, 3),
    ]
    contents = open_source(f"{tmp_path}").contents()
    assert contents.left_out == {"label in JSON that is a word, and no integer": 2}
    assert contents.labelled == 1


@pytest.mark.parametrize("names", [("a", "b"), ("part-a", "part-b"), ("images", "more_images"), ("laion_high", "coco")])
def test_tars_that_are_named_as_parts_are_no_classes(tmp_path, names):
    for name in names:
        write_tar(tmp_path / f"{name}.tar", {"0.jpg": A})
    assert open_source(f"{tmp_path}").class_names == []
