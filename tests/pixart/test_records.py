"""The reader of records: every damage is one line that names the file."""

import time
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

import pytest

from pixart import records
from pixart.records import Count


class Entry(TypedDict):
    rows: Count
    name: NotRequired[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    size: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    inner: tuple[Inner, ...] = ()


DAMAGES = [
    (b"", "is not JSON"),
    (b"{", "is not JSON"),
    (b"[" * 100_000, "nested too deeply"),
    (b'{"rows": 1, "x": ' + b"[" * 80 + b"]" * 80 + b"}", "nested more than 64 levels"),
    (b'{"rows": 1, "x": ' + b'{"a":' * 80 + b"1" + b"}" * 81, "nested more than 64 levels"),
    ('{"rows": 1}'.encode("utf-16"), "no text in utf-8"),
    (b'\xef\xbb\xbf{"rows": 1}', "is not JSON"),
    (b'{"rows": 1, "x": "\\ud800"}', "half a character"),
    (b'{"rows": ' + b"9" * 5000 + b"}", "is not JSON"),
    (b'{"rows": ' + b"9" * 400 + b"}", "Expected 'int'"),
    (b'{"rows": -1}', ">= 0 at 'rows'"),
    (b'{"rows": "1"}', "got 'str' at 'rows'"),
    (b'{"rows": true}', "got 'bool' at 'rows'"),
    (b'{"rows": NaN}', "Expected 'int'"),
    (b'{"rows": 1, "name": ["\\n\\u001b[2J"]}', "got 'array' at 'name'"),
    (b"[1]", "got 'array'"),
    (b"{}", "missing required field 'rows'"),
]


@pytest.mark.parametrize(("text", "message"), DAMAGES)
def test_a_damaged_record_is_one_line_that_names_the_file(tmp_path, text, message):
    path = tmp_path / "entry.json"
    path.write_bytes(text)
    begun = time.monotonic()
    with pytest.raises(ValueError, match=r"^.*entry\.json: ") as caught:
        records.read(path, Entry)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - begun < 1


def test_keys_that_a_dictionary_does_not_have_stay_and_those_of_a_dataclass_are_refused():
    assert records.parse('{"rows": 1, "later": [2]}', Entry, "entry") == {"rows": 1, "later": [2]}
    assert records.parse('{"inner": [{"size": 3}]}', Outer, "outer") == Outer(inner=(Inner(size=3),))
    for text in ('{"blur": 1}', '{"inner": [{}, {"blur": 1}]}'):
        with pytest.raises(ValueError, match=r"^outer: .*has the key '.*blur'"):
            records.parse(text, Outer, "outer")


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "entries.jsonl"
    path.write_text('{"rows": 1}\n\n{"rows": 2}\n')
    assert records.read_lines(path, Entry) == [{"rows": 1}, {"rows": 2}]
    path.write_text('{"rows": 1}\n{"rows"')
    with pytest.raises(ValueError, match="line 2: is not JSON"):
        records.read_lines(path, Entry)


@pytest.mark.parametrize("text", ["a = " + "[" * 100_000, "a =", b"\xff", "a = [" * 80 + "]" * 80])
def test_toml_is_read_likewise(text):
    with pytest.raises(ValueError, match=r"^run\.toml: is"):
        records.parse_toml(text, "run.toml")


def test_a_record_is_not_read_from_a_pipe(tmp_path):
    import os

    os.mkfifo(tmp_path / "entry.json")
    with pytest.raises(ValueError, match="is not a file"):
        records.read(tmp_path / "entry.json", dict[str, Any])
