"""Reference of all configuration keys: type, default and meaning, read from the dataclasses that define them."""

import ast
import functools
import inspect
import itertools
import textwrap
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from pixart.config.keys.fields import allowed_values, fields_by_key
from pixart.config.recipe import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """A configuration key."""

    name: str
    """Dotted name, such as `stage1.lr`."""

    type: str
    """Values that it may have, such as `a whole number` or `bf16 or fp32`."""

    default: Any
    """Value in the recipe that the reference was made for."""

    meaning: str
    """One line of whole sentences, with units."""


def keys(recipe: Recipe) -> list[Key]:
    """Return the reference of every key in the order of definition, with the recipe's values as defaults."""
    return [
        Key(
            name=field.key,
            type=allowed_values(field.annotation),
            default=attrgetter(field.key)(recipe),
            meaning=meanings(field.owner).get(field.name, ""),
        )
        for field in fields_by_key().values()
    ]


@functools.cache
def meanings(config: type) -> dict[str, str]:
    """Return the text of the string literal below each field of a dataclass, as one line, by the field's name."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(definition, ast.ClassDef)
    texts: dict[str, str] = {}
    for statement, following in itertools.pairwise(definition.body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = following.value.value if _is_literal(following) else ""  # type: ignore[attr-defined]
            texts[statement.target.id] = " ".join(text.split())
    return texts


def _is_literal(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )
