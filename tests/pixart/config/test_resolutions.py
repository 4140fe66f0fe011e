import dataclasses
import json

import pytest

from pixart.config.recipe import from_json, to_json
from pixart.config.resolutions import (
    check_multiples,
    check_trained,
    describe_sizes,
    nearest_to_square,
    parse_size,
    recorded_time_shift,
    time_shift,
    trained_shapes,
)
from pixart.recipes import demo


def test_auto_is_one_at_the_base_and_the_ratio_of_the_sides_elsewhere():
    assert time_shift("auto", 32, 32, 32) == 1
    assert time_shift("auto", 64, 64, 32) == 2
    assert time_shift("auto", 16, 64, 32) == 1
    assert time_shift("3", 64, 64, 32) == 3


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "automatic", ""])
def test_a_setting_of_another_form_is_refused(value: str):
    with pytest.raises(ValueError, match=r"time_shift=.*: must be auto or a positive number"):
        dataclasses.replace(demo("home").stage1, time_shift=value)


def test_records_from_before_the_key_are_unshifted():
    assert recorded_time_shift({"provenance": {}}) == "1"
    recipe = demo("home")
    assert from_json(to_json(recipe)) == recipe
    values = json.loads(to_json(recipe))
    del values["stage1"]["time_shift"]
    assert from_json(json.dumps(values)).stage1.time_shift == "1"


def test_sizes_are_width_by_height_and_shapes_height_by_width():
    assert parse_size("1024x768") == (768, 1024)
    assert describe_sizes([parse_size("1024x768"), (512, 512)]) == "1024x768, 512x512"


@pytest.mark.parametrize("text", ["", "1024", "1024x", "0x64", "64x64,64x64", "64X64", "-64x64"])
def test_texts_of_another_form_are_refused(text: str):
    with pytest.raises(ValueError, match="must be WIDTHxHEIGHT in pixels"):
        parse_size(text)


def test_the_default_is_the_trained_shape_nearest_to_the_square():
    assert nearest_to_square([(48, 96), (64, 80), (96, 48)]) == (64, 80)
    assert nearest_to_square([(32, 32), (64, 64), (48, 96)]) == (64, 64)


def test_a_record_has_the_trained_shapes():
    record = {"provenance": {"image_shapes": [[64, 128], [128, 64]], "downsampling_factor": 8}}
    assert trained_shapes(record) == ([(64, 128), (128, 64)], 8)
    assert trained_shapes({}) == ([], 1)


def test_other_sizes_are_refused_by_name():
    check_trained([(64, 128)], [(64, 128), (128, 64)], "step")
    with pytest.raises(ValueError, match="--size 96x64: step was not trained at this size, but at 128x64; give one"):
        check_trained([(64, 96)], [(64, 128)], "step")
    check_multiples([(64, 128)], 16)
    with pytest.raises(ValueError, match="--size 100x64: both sides must be multiples of 16"):
        check_multiples([(64, 100)], 16)
