"""Overrides of a recipe's values by dotted key, as the command line and `run.toml` give them."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin

from pixart.config.captions import Instruction, read_instruction
from pixart.config.keys.fields import NONE, Field, allowed_values, fields_by_key, optional, sections
from pixart.config.recipe import Recipe

Config = TypeVar("Config")
Value = TypeVar("Value")


def apply(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """Return `recipe` with each `dotted.key=value` set; of two values for one key the later holds.

    The result is validated once, with all values set, so that the order of assignments does not matter. Raises
    ValueError of one line, which names the key, its value and what is allowed, for an unknown key, for a value of the
    wrong type or out of range, and for values that do not go together.
    """
    changes: dict[str, Any] = {}
    for assignment in assignments:
        field, value = parse(assignment)
        changes[field.key] = value
    return _replace(recipe, changes, "") if changes else recipe


def parse(assignment: str) -> tuple[Field, Any]:
    """Return the field that a `dotted.key=value` sets and its value. Raises ValueError as `apply` does."""
    key, separator, text = assignment.partition("=")
    if not key:
        raise ValueError(f"{assignment!r}: has no key; write KEY=VALUE, such as stage1.steps=100")
    field = find(key)
    if not separator:
        raise ValueError(f"{key}: has no value; write {key}=VALUE, where VALUE is {allowed_values(field.annotation)}")
    if field.annotation is Instruction:
        try:
            return field, read_instruction(text)
        except ValueError as error:
            raise ValueError(f"{key}={error}") from None
    try:
        return field, parse_value(field.annotation, text)
    except ValueError:
        raise ValueError(f"{key}={text!r}: must be {allowed_values(field.annotation)}") from None


def find(key: str) -> Field:
    """Return the field of a dotted key. Raises ValueError, with the nearest keys, for an unknown one."""
    fields = fields_by_key()
    if key in fields:
        return fields[key]
    if within := [name for name in fields if name.startswith(f"{key}.")]:
        raise ValueError(f"{key}: is a section, not a key; set one of {', '.join(within)}")
    raise ValueError(f"{key}: unknown key; {suggestion(key)}")


def suggestion(key: str) -> str:
    """Return what an unknown key may have meant, or else what is allowed in its place.

    Looks for the same name in another section, then for near names in its section, then for the nearest key of all.
    """
    keys = list(fields_by_key())
    section, _, name = key.rpartition(".")
    neighbours = [known for known in keys if section and known.startswith(f"{section}.")]
    names = [known.removeprefix(f"{section}.") for known in neighbours]
    near = [known for known in keys if known.rpartition(".")[2] == name]
    near = near or [f"{section}.{known}" for known in difflib.get_close_matches(name, names, n=1)]
    near = near or [f"{section}.{known}" for known in names if len(name) > 2 and name in known]
    if not neighbours:
        near = near or difflib.get_close_matches(key, keys, n=1)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"it must be one of {', '.join(neighbours or [f'{name}.*' for name in sections(Recipe)])}"


def parse_value(annotation: Any, text: str) -> Any:
    """Return the value of an annotated type that `text` stands for. Raises ValueError for a text that has none.

    Integers may be written as `1_000` and `1e3`.
    """
    if kind := optional(annotation):
        return None if text.lower() == NONE else parse_value(kind, text)
    if get_origin(annotation) is Literal:
        return _one_of({choice: choice for choice in get_args(annotation)}, text)
    if get_origin(annotation) is tuple:
        kinds, parts = get_args(annotation), text.strip().removeprefix("[").removesuffix("]").split(",")
        return tuple(parse_value(kind, part.strip()) for kind, part in zip(kinds, parts, strict=True))
    if annotation is bool:
        return _one_of({"true": True, "false": False}, text.lower())
    if annotation is int:
        return parse_integer(text)
    return annotation(text)


def parse_integer(text: str) -> int:
    """Return the integer that `text` stands for. Raises ValueError for a fraction, infinity or NaN."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


def _one_of(choices: Mapping[str, Value], text: str) -> Value:
    if text not in choices:
        raise ValueError(text)
    return choices[text]


def _replace(config: Config, changes: dict[str, Any], prefix: str) -> Config:
    """Return a dataclass with the changed values of the keys that begin with `prefix`, nested ones included."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        key = f"{prefix}{field.name}"
        if key in changes:
            values[field.name] = changes[key]
        elif any(changed.startswith(f"{key}.") for changed in changes):
            values[field.name] = _replace(getattr(config, field.name), changes, f"{key}.")
    try:
        return dataclasses.replace(config, **values)  # type: ignore[type-var]
    except ValueError as error:
        raise ValueError(f"{prefix}{error}") from None
