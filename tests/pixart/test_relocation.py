"""Paths in the records of a home folder that moves."""

import pytest

from pixart.relocation import FILE, home_of, locations, portable, present, record_location


def test_paths_follow_the_home(tmp_path):
    first, second, third = (tmp_path / name for name in ("first", "first-2", "third"))
    (first / "runs/a").mkdir(parents=True)
    record_location(first)
    record = {"dataset": f"{first}/datasets/cats", "prompt": f"a sign that says {first}", "numbers": [1, None]}
    record["others"] = [str(first), f"{second}/x", "/elsewhere/first/x", "s3://bucket/x"]
    written = portable(record, home_of(first / "runs/a"))
    assert written["dataset"] == "{home}/datasets/cats"
    assert present(written, first) == record
    first.rename(second)
    record_location(second)
    second.rename(third)
    for _ in range(2):
        record_location(third)
    assert locations(third) == [str(first), str(second), str(third)]
    first.mkdir()  # what is at an earlier location now is another home
    for recorded in (written, record):  # of this version, and absolute as in older ones
        moved = present(recorded, home_of(third / "runs/a"))
        assert moved["dataset"] == f"{third}/datasets/cats"
        assert moved["prompt"] == record["prompt"]
        assert moved["others"] == [str(third), f"{third}/x", *record["others"][2:]]


def test_outside_of_a_home_paths_stay(tmp_path):
    assert home_of(tmp_path) is None
    assert present({"dataset": "{home}/x"}, None) == portable({"dataset": "{home}/x"}, None) == {"dataset": "{home}/x"}
    (tmp_path / FILE).write_text('{"places": []}')
    with pytest.raises(ValueError, match="is damaged or of another version"):
        locations(tmp_path)
