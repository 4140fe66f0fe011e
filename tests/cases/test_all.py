"""Every row of the description of the cases has a test."""

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.cases import test_checkpoints, test_cluster, test_sources


def rows_of(text: str) -> list[str]:
    """Return the names of the rows: those of sources and checkpoints one by one, the others as they are written."""
    rows = re.findall(r"^\| (.+?) \|", text.partition("|---|")[2], re.MULTILINE)
    names = []
    for row in rows:
        words = re.findall(r"`([^`]+)`", row)
        is_list = row.replace(", ", "") == "".join(f"`{word}`" for word in words) and " " not in "".join(words)
        named = is_list and "=" not in row
        names += [word.removeprefix("sources/") for word in words] if named else [row]
    return names


def ids_of(module) -> list[str]:
    """Return the values of `name` or `case` that the tests of a module are called with."""
    marks = [mark for item in vars(module).values() for mark in getattr(item, "pytestmark", [])]
    return [value for mark in marks for value in mark.args[1] if mark.name == "parametrize"]


def test_every_case_has_a_test(shared_data):
    readme = Path(shared_data.parent / "cases/README.md")
    if not readme.exists():
        pytest.skip(f"the cases are not at {readme.parent}")
    ids = [name for module in (test_checkpoints, test_cluster, test_sources) for name in ids_of(module)]
    names = rows_of(readme.read_text())
    assert len(names) > 40
    assert [name for name in names if not any(fnmatch(item, name) or item == name for item in ids)] == []
