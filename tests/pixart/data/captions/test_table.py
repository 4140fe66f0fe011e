"""Rows of items whose label, text or image could not be read."""

import pytest

from pixart.config.dataset import ScreeningConfig
from pixart.data.captions.table import screen
from pixart.data.sources.base import Item
from tests.pixart.data.sources.test_sources import noise_image

LIMITS = ScreeningConfig(min_side=8)


@pytest.mark.parametrize(
    ("values", "with_text", "without_text"),
    [
        ({"text": "a cat", "label": -1}, "", ""),
        ({"text": "", "label": -1}, "no words", ""),
        ({"text": "", "label": 3}, "", ""),
        ({"text": "", "label": 3, "text_problem": "bad"}, "unreadable text", ""),
        ({"text": "a cat", "label": -1, "label_problem": "bad"}, "unreadable label", "unreadable label"),
        ({"text": "a cat", "label": 3, "image_problem": "missing"}, "unreadable", "unreadable"),
    ],
)
def test_reason_of_an_item(values, with_text, without_text):
    item = Item(id="0", data=noise_image(1), **values)
    assert screen(item, LIMITS, reads_text=True).reason == with_text
    assert screen(item, LIMITS).reason == without_text
