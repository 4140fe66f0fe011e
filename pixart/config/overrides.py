"""Overrides of a recipe by dotted key, as the command line has them."""

import dataclasses
import types
import typing
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pixart.config.recipe import Recipe


def override(recipe: Recipe, assignments: list[str]) -> Recipe:
    """Returns `recipe` with each `dotted.key=value` applied.

    Raises ValueError naming the key and what is allowed for an unknown key or a value of the wrong type.
    """
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise ValueError(f"override {assignment!r}: write it as key=value, for example stage1.steps=100")
        recipe = _replace(recipe, key.split("."), text, key)
    return recipe


def _replace(config: Any, path: list[str], text: str, key: str) -> Any:
    name, rest = path[0], path[1:]
    allowed = [field.name for field in dataclasses.fields(config)]
    if name not in allowed:
        raise ValueError(f"unknown configuration key {key!r}: {name!r} is not one of {', '.join(allowed)}")
    value = getattr(config, name)
    if dataclasses.is_dataclass(value):
        if not rest:
            inner = ", ".join(f"{key}.{field.name}" for field in dataclasses.fields(value))
            raise ValueError(f"configuration key {key!r} is a group; set one of {inner}")
        return dataclasses.replace(config, **{name: _replace(value, rest, text, key)})
    if rest:
        raise ValueError(f"unknown configuration key {key!r}: {name!r} has no parts")
    parsed = parse_value(get_type_hints(type(config))[name], text, key)
    try:
        return dataclasses.replace(config, **{name: parsed})
    except ValueError as error:
        raise ValueError(f"{key.removesuffix(name)}{error}") from None


def parse_value(kind: Any, text: str, key: str) -> Any:
    """Reads `text` as a value of the annotated type `kind`, one of those that the configuration uses."""
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ValueError(f"{key}={text!r}: must be one of {', '.join(get_args(kind))}")
        return text
    if get_origin(kind) in (typing.Union, types.UnionType):  # only `T | None` is used
        if text.lower() == "none":
            return None
        return parse_value(get_args(kind)[0], text, key)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{key}={text!r}: must be true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{key}={text!r}: must be of type {kind.__name__}") from None
