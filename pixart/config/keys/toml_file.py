"""Configuration files in TOML, `run.toml` for short.

    recipe = "xl"                # recipe to begin with
    dataset = "s3://bucket/data" # directory or URL of the dataset
    cluster = "hpg-b200"         # cluster profile
    home = "/scratch/project"    # folder of datasets, runs and tracking

    [stage1]                     # any configuration key, in the table of its section
    global_batch_size = 1024

    [data.screening]
    min_side = 128

All of it is optional. TOML has no null: `max_images = "none"` stands for None.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_origin

from pixart import records
from pixart.config.keys import overrides, reference
from pixart.config.keys.fields import NONE, fields_by_key, sections
from pixart.config.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFile:
    """Content of a configuration file; None for a name that it does not give."""

    recipe: str | None = None
    dataset: str | None = None
    cluster: str | None = None
    home: str | None = None
    overrides: tuple[str, ...] = ()  # `dotted.key=value`, for `pixart.config.keys.overrides.apply`


def load(path: str | Path) -> RunFile:
    """Read a configuration file.

    Raises ValueError of one line, which names the file and the key, for a file that cannot be read or is not TOML, for
    an unknown key and for a value of the wrong type. Values out of range are refused when the overrides are applied.
    """
    try:
        text = records.read_limited(Path(path))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read; {error.strerror or error}") from None
    content = records.parse_toml(text, str(path))
    try:
        return _run_file(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def dumps(recipe: Recipe, *, meanings: bool = False) -> str:
    """Return a recipe as the text of a configuration file, with every key and, if asked, its meaning as a comment.

    The overrides that `load` reads from it turn any other recipe into this one, except for its name.
    """
    import tomlkit

    document = tomlkit.document()
    document.add("recipe", tomlkit.string(recipe.name))
    tables: dict[str, Any] = {}
    for key in reference.keys(recipe):
        section, _, name = key.name.rpartition(".")
        if section not in tables:
            tables[section] = tomlkit.table()
            parent, _, last = section.rpartition(".")
            (tables[parent] if parent else document).add(last, tables[section])
        if meanings:
            tables[section].add(tomlkit.comment(key.meaning))
        tables[section].add(name, NONE if key.default is None else key.default)
    return tomlkit.dumps(document)


def _run_file(content: Mapping[str, Any]) -> RunFile:
    names = [field.name for field in fields(RunFile) if field.name != "overrides"]
    for name, value in content.items():
        if name in names and not isinstance(value, str):
            raise ValueError(f"{name}={value!r}: must be a string")
        if name not in (*names, *sections(Recipe)):
            near = difflib.get_close_matches(name, [*names, *sections(Recipe)], n=1)
            meant = f"did you mean {near[0]}?" if near else f"it must be one of {', '.join(names)} or a section"
            raise ValueError(f"{name}: unknown key; {meant}")
    assignments = [
        assignment for name, value in content.items() if name not in names for assignment in _flatten(name, value)
    ]
    for assignment in assignments:
        overrides.parse(assignment)
    return RunFile(overrides=tuple(assignments), **{name: content.get(name) for name in names})


def _flatten(key: str, value: Any) -> Iterator[str]:
    """Yield a `dotted.key=value` for each value of a table."""
    if isinstance(value, dict):
        if key in fields_by_key():
            raise ValueError(f"{key}: is a key, not a section; write {key.rpartition('.')[2]} = VALUE in its section")
        if not any(known.startswith(f"{key}.") for known in fields_by_key()):
            overrides.find(key)  # raises that it is unknown
        for name, inner in value.items():
            yield from _flatten(f"{key}.{name}", inner)
    elif isinstance(value, bool):
        yield f"{key}={str(value).lower()}"
    elif isinstance(value, str | int | float):
        yield f"{key}={value}"
    elif isinstance(value, list) and get_origin(overrides.find(key).annotation) is tuple:
        yield f"{key}={','.join(map(str, value))}"
    else:
        raise ValueError(f"{key}={value!r}: must be a string, a number or a boolean")
