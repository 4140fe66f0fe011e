"""Text from data is printed without characters that control a terminal."""

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from conversion import to_fp8
from jobs import launch
from pixart.terminal import printable

HOSTILE = "a\x1b[2J\x1b]0;title\x07b\rc\nforged: PASS\u202e\x9b31m"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain ★ ü 漢", "plain ★ ü 漢"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\u202eabc", "\\u202eabc"),
        ("\udcff", "\\udcff"),
        (7, "7"),
    ],
)
def test_characters_that_are_not_printable_are_escaped(text, expected):
    assert printable(text) == expected


def test_errors_with_hostile_names_are_one_harmless_line(tmp_path, capsys):
    for main, words in (
        (to_fp8.main, [str(tmp_path / HOSTILE)]),
        (launch.main, ["sample", str(tmp_path / HOSTILE)]),
        (launch.main, ["status", HOSTILE, "--home", str(tmp_path)]),
        (launch.main, ["train", "--from", str(tmp_path / HOSTILE), "--cluster", "local"]),
    ):
        assert main(words) == 2
        output = capsys.readouterr()
        assert len(output.err.strip("\n").splitlines()) == 1
        assert all(letter.isprintable() or letter == "\n" for letter in output.err + output.out)


def test_the_lineage_of_a_hostile_image_is_harmless(tmp_path, capsys):
    text = PngInfo()
    for name, value in {"checkpoint": f"/{HOSTILE}", "prompt": HOSTILE, "seed": "1"}.items():
        text.add_text(name, value)
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png", pnginfo=text)
    assert launch.main(["lineage", str(tmp_path / "image.png"), "--home", str(tmp_path)]) == 0
    assert all(letter.isprintable() or letter == "\n" for letter in capsys.readouterr().out)
