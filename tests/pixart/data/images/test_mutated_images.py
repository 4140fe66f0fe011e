import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from pixart.data.images.screening import Reason
from tests.support.mutations import COUNT, SECONDS

ROOT = Path(__file__).parents[4]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lines() -> list[dict]:
    """Screen all images in one separate process: a result per image, and one of the process as the last line."""
    command = [sys.executable, "-m", "tests.support.mutations"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-5000:]  # neither an exception, a crash nor a hang
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_image_has_a_result(lines):
    reasons = Counter(line["reason"] for line in lines[:-1])
    print(dict(reasons))
    assert len(lines) == COUNT + 1
    assert set(reasons) <= {*Reason, "kept"}
    assert reasons["kept"] >= 50  # the damaged bytes do not affect decoding
    assert reasons[Reason.TRUNCATED] >= 50
    assert reasons[Reason.UNREADABLE] >= 100
    assert all(line["detail"] for line in lines[:-1] if line["reason"] != "kept")


def test_time_and_memory_are_limited(lines):
    *images, process = lines
    slowest = sorted(images, key=lambda line: -line["seconds"])[:3]
    print([(line["name"], f"{line['seconds']:.2f} s") for line in slowest], process)
    assert slowest[0]["seconds"] < SECONDS
    assert process["peak_mib"] < 1200  # 50 million pixels, of which a decoder holds up to four copies


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("png of 900 million pixels", Reason.TOO_MANY_PIXELS),
        ("png of 2**31 pixels a side", Reason.TOO_MANY_PIXELS),
        ("gif of a huge screen", Reason.TOO_MANY_PIXELS),
        ("webp-frames says 30000x30000", Reason.TOO_MANY_PIXELS),
        ("bmp-rle of 48 million pixels", Reason.TOO_MANY_PIXELS),
        ("png: zTXt decompression bomb", Reason.SOLID_COLOR),
        ("png: iTXt decompression bomb", Reason.SOLID_COLOR),
        ("png: iCCP decompression bomb", Reason.SOLID_COLOR),
        ("jpeg of 1,000 scans", Reason.UNREADABLE),
        ("png says 96x192, checksum wrong", Reason.UNREADABLE),
        ("jpeg says 96x192", Reason.TRUNCATED),
        ("progressive says 96x192", Reason.TRUNCATED),
        ("gif's frame says 96x192", Reason.TRUNCATED),
        ("bmp says 96x192", Reason.TRUNCATED),
        ("jpeg says 96x30000", Reason.EXTREME_ASPECT),
        ("tiff says 1x1", Reason.TOO_SMALL),
        ("jpeg of 30 scans", Reason.SOLID_COLOR),
        ("apng says 2**31 frames", "kept"),
        ("webp of 250 frames", Reason.SOLID_COLOR),
        ("gif of 20,000 frames", "kept"),
    ],
)
def test_expected_result_of_crafted_images(lines, name, reason):
    assert [line["reason"] for line in lines[:-1] if line["name"] == name] == [reason]
