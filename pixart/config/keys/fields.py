"""The keys of a recipe: each field of its sections by its dotted name."""

import dataclasses
import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pixart.config.captions import FILE_PREFIX, Instruction
from pixart.config.recipe import Recipe

NONE = "none"  # the text of None: TOML has no null


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """A key, such as `stage1.lr`, and the dataclass field that holds its value."""

    key: str
    name: str
    annotation: Any
    owner: type


@functools.cache
def fields_by_key() -> dict[str, Field]:
    """Return the fields of all sections of a recipe by their dotted keys, in the order of their definition."""
    return {field.key: field for name, section in sections(Recipe).items() for field in _walk(section, name)}


def sections(config: type) -> dict[str, type]:
    """Return the fields of a dataclass that are dataclasses themselves, by name."""
    types_of_fields = ((field.name, field.type) for field in dataclasses.fields(config))
    return {name: kind for name, kind in types_of_fields if isinstance(kind, type) and dataclasses.is_dataclass(kind)}


def _walk(config: type, prefix: str) -> Iterator[Field]:
    nested = sections(config)
    for field in dataclasses.fields(config):
        key = f"{prefix}.{field.name}"
        if field.name in nested:
            yield from _walk(nested[field.name], key)
        else:
            yield Field(key=key, name=field.name, annotation=field.type, owner=config)


def optional(annotation: Any) -> Any | None:
    """Return T for the annotation `T | None`, and None for any other."""
    if get_origin(annotation) not in (Union, types.UnionType):
        return None
    return next(kind for kind in get_args(annotation) if kind is not types.NoneType)


def allowed_values(annotation: Any) -> str:
    """Return the values that an annotation allows, as errors and the reference of keys name them."""
    if kind := optional(annotation):
        return f"{allowed_values(kind)} or {NONE}"
    if get_origin(annotation) is Literal:
        *first, last = get_args(annotation)
        return f"{', '.join(first)} or {last}"
    if get_origin(annotation) is tuple:
        return f"{len(get_args(annotation))} whole numbers, separated by commas"
    if annotation is Instruction:
        return f"a text or {FILE_PREFIX}FILE"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}[annotation]
