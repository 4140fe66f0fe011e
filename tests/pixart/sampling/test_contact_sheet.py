"""Contact sheets show images at their size, below a head."""

import numpy as np
import pytest
from PIL import Image

from pixart.sampling.contact_sheet import EDGE, GAP, LINE, MAX_WIDTH, MIN_CELL, contact_sheet


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 250, (height, width, 3), np.uint8))


@pytest.mark.parametrize("head", [(), ("checkpoint step-8, EMA weights", "20 steps")])
def test_images_are_shown_pixel_by_pixel(head):
    images = [noise(300, 200), noise(200, 300)]
    sheet = contact_sheet(images, ["a", "b"], head=head)
    top = GAP + (len(head) * LINE + GAP if head else 0)
    assert sheet.width == 2 * (300 + GAP) + GAP
    for index, (image, offset) in enumerate(zip(images, [(0, 50), (50, 0)], strict=True)):
        left = GAP + index * (300 + GAP) + offset[0]
        box = (left, top + offset[1], left + image.width, top + offset[1] + image.height)
        assert sheet.crop(box).tobytes() == image.tobytes()
        assert "#{:02x}{:02x}{:02x}".format(*sheet.getpixel((left - 1, box[1]))) == EDGE
    dark = np.asarray(sheet.crop((0, 0, sheet.width, top - 2))).min()
    assert (dark < 100) == bool(head)


def test_small_images_are_enlarged_and_large_ones_reduced():
    small = noise(64, 64)
    sheet = contact_sheet([small], ["a caption"])
    assert sheet.width == 3 * 64 + 2 * GAP >= MIN_CELL
    assert sheet.crop((GAP, GAP, GAP + 192, GAP + 192)).tobytes() == small.resize((192, 192), 0).tobytes()
    large = contact_sheet([noise(1024, 1024)] * 9, ["a"] * 9)
    assert MAX_WIDTH - 16 < large.width <= MAX_WIDTH
