import pytest

from jobs.commands.data.shard_ranges import parse_array


@pytest.mark.parametrize(
    ("text", "shards", "limit"),
    [
        ("0-255", list(range(256)), None),
        ("0-7%2", list(range(8)), 2),
        ("3,7,9-12", [3, 7, 9, 10, 11, 12], None),
        ("0-999:250", [0, 250, 500, 750], None),
        ("5", [5], None),
        ("7,3,3-4", [3, 4, 7], None),
    ],
)
def test_slurm_notation(text, shards, limit):
    assert parse_array(text) == (shards, limit)


def test_without_the_option_every_shard_is_selected():
    assert parse_array(None) == (None, None)


@pytest.mark.parametrize(
    "text", ["", "5-2", "a", "-1", "1-", "1,,2", "0-4:0", "0-4%0", "0-4%", "0-4%x", "1.5", " 1", "0x1", "1-2-3", "٣"]
)
def test_other_array_notations_are_refused(text):
    with pytest.raises(ValueError, match="--array") as caught:
        parse_array(text)
    assert "\n" not in str(caught.value)
