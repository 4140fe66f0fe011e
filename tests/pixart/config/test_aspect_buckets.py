"""Grammar of aspect buckets, their shapes, and the nearest shape of an image."""

import math

import numpy as np
import pytest

from pixart.config.aspect_buckets import MAX_BUCKETS, bucket_shapes, kept_fraction, nearest_bucket
from pixart.config.dataset import DataConfig


def test_no_buckets():
    assert bucket_shapes(None, 256) == ()


@pytest.mark.parametrize("size", [256, 512, 1024])
def test_the_40_shapes_of_pixart(size):
    shapes = bucket_shapes("pixart", size)
    assert len(shapes) == len(set(shapes)) == 40
    assert (size, size) in shapes
    ratios = [height / width for height, width in shapes]
    assert ratios == sorted(ratios)
    assert (ratios[0], ratios[-1]) == (0.25, 4.0)
    assert max(abs(height * width / size**2 - 1) for height, width in shapes) < 0.1
    # The first and the last of the published list at 1024 pixels, heights first.
    if size == 1024:
        assert shapes[0] == (512, 2048)
        assert {(576, 1792), (960, 1024), (1024, 960), (2048, 512)} <= set(shapes)


@pytest.mark.parametrize(("text", "size"), [("32:2", 256), ("64:3", 512), ("8:1.5", 64), ("256:4", 256)])
def test_stepped_shapes_are_the_largest_of_their_ratio(text, size):
    step, ratio = (float(part) for part in text.split(":"))
    shapes = bucket_shapes(text, size)
    assert (size, size) in shapes
    assert len(set(shapes)) == len(shapes)
    for height, width in shapes:
        assert height % step == width % step == 0
        assert height * width <= size**2
        assert max(height, width) / min(height, width) <= ratio
        assert (width, height) in shapes
        assert min(height, width) * (max(height, width) + step) > size**2  # the longer side cannot grow


def test_listed_shapes_are_widths_and_heights():
    assert bucket_shapes("320x192, 256x256,192x320", 256) == ((192, 320), (256, 256), (320, 192))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be pixart, STEP:RATIO"),
        ("square", "must be pixart, STEP:RATIO"),
        ("256", "must be pixart, STEP:RATIO"),
        ("256x0", "must be pixart, STEP:RATIO"),
        ("-8x8", "must be pixart, STEP:RATIO"),
        ("256x256,", "must be pixart, STEP:RATIO"),
        ("256x192,256x256,256x192", "256x192 is listed twice; remove one"),
        ("0:2", "the step must divide image_size=256"),
        ("96:2", "the step must divide image_size=256"),
        ("32:0.5", "must be at least 1"),
        ("1:4", f"it must have at most {MAX_BUCKETS}"),
    ],
)
def test_wrong_buckets_are_refused_in_one_line(text, message):
    with pytest.raises(ValueError, match=message) as error:
        DataConfig(path="", image_size=256, aspect_buckets=text)
    assert str(error.value).startswith(f"aspect_buckets={text}: ")
    assert "\n" not in str(error.value)


def test_pixart_shapes_need_a_multiple_of_16():
    with pytest.raises(ValueError, match="image_size=200 must be a multiple of 16"):
        bucket_shapes("pixart", 200)


def test_the_nearest_bucket_crops_the_least():
    """Among shapes of any area, no other shape keeps more of a random image."""
    random = np.random.default_rng(0)
    for text in ("pixart", "32:3", "256x256,128x384,320x192"):
        shapes = bucket_shapes(text, 256)
        for width, height in random.integers(64, 2000, (200, 2)).tolist():
            nearest = nearest_bucket(width, height, shapes)
            kept = [kept_fraction(width, height, shape) for shape in shapes]
            assert math.isclose(kept[nearest], max(kept))


def test_ties_go_to_the_larger_shape_and_then_to_the_first():
    assert nearest_bucket(100, 100, ((64, 64), (128, 128), (32, 32))) == 1
    assert nearest_bucket(100, 100, ((64, 128), (128, 64))) == 0


@pytest.mark.parametrize(
    ("size", "shape", "kept"), [((200, 100), (64, 64), 0.5), ((100, 200), (64, 64), 0.5), ((30, 20), (20, 30), 1.0)]
)
def test_kept_fraction(size, shape, kept):
    assert kept_fraction(*size, shape) == pytest.approx(kept)
