"""Recorded paths of a home folder that has moved: they are translated when a record is read.

A home folder has a file `home.json` with all paths at which it has been. Records inside it write paths in the home as
`{home}/datasets/cats`; in older records, and in images that were copied elsewhere, they are absolute, and those below
an earlier location stand for the same file at the present one, even if the earlier location still exists.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypedDict

from pixart import records
from pixart.atomic import write_atomically

FILE = "home.json"
HOME = "{home}"


class Locations(TypedDict):
    """The file of a home folder."""

    locations: list[str]


def record_location(home: Path, earlier: Sequence[Path] = ()) -> None:
    """Add the present path of a home folder to its file, after the `earlier` ones that are not in it yet."""
    present = str(home.absolute())
    known = locations(home)
    added = [*known, *(str(path) for path in earlier if str(path) not in known)]
    if present not in added:
        added.append(present)
    if added != known:
        write_atomically(home / FILE, json.dumps({"locations": added}, indent=2) + "\n")


def locations(home: Path) -> list[str]:
    """Return the paths at which a home folder has been, in order. Raises ValueError if its file is damaged."""
    try:
        return list(records.read(home / FILE, Locations)["locations"])
    except FileNotFoundError:
        return []


def home_of(path: Path) -> Path | None:
    """Return the home folder that a path is in; None outside of one."""
    absolute = Path(os.path.abspath(path))  # noqa: PTH100 - a link to a home keeps its name
    return next((parent for parent in (absolute, *absolute.parents) if (parent / FILE).is_file()), None)


def portable(value: Any, home: Path | None) -> Any:
    """Return JSON values with paths in the home as they are written to records; without a home, unchanged."""
    if home is None:
        return value
    return translated(value, lambda text: replaced(text, [str(home)], HOME))


def present(value: Any, home: Path | None) -> Any:
    """Return JSON values of a record with the present paths of what is in the home; without a home, unchanged."""
    if home is None:
        return value
    present_path = str(home)
    earlier = [HOME, *sorted((path for path in locations(home) if path != present_path), key=len, reverse=True)]
    return translated(value, lambda text: replaced(text, earlier, present_path))


def translated(value: Any, translate: Callable[[str], str]) -> Any:
    """Return JSON values with `translate` applied to every text but the keys."""
    if isinstance(value, str):
        return translate(value)
    if isinstance(value, dict):
        return {key: translated(one, translate) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [translated(one, translate) for one in value]
    return value


def replaced(text: str, prefixes: Sequence[str], replacement: str) -> str:
    """Return a path with the first of the folders `prefixes` that it is in replaced; any other text unchanged."""
    for prefix in prefixes:
        if text == prefix or text.startswith(f"{prefix}/"):
            return replacement + text[len(prefix) :]
    return text
