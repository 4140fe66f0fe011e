"""The configuration reference: every key with its type, its values in the recipes and its meaning."""

from jobs.commands.config import describe
from pixart.config.keys import reference
from pixart.recipes import RECIPES
from tests.support.documentation.markdown import code, escape, table

HOME = "outputs"
COLUMNS = ("demo", "xl")
INTRODUCTION = """# Configuration keys

Set a key by `--set KEY=VALUE`, or in a file for `--config`, which `python -m jobs.launch config --toml` writes. The
columns `demo` and `xl` have the values of these recipes, with long texts shortened. `python -m jobs.launch config`
prints the same for any recipe.
"""
DIFFERENCES = """## Values of the recipe xl-mxfp8

`xl-mxfp8` has the values of `xl`, except for these.
"""


def page() -> str:
    """Return the page of all configuration keys, a table for each section."""
    keys = {name: reference.keys(RECIPES[name](HOME)) for name in RECIPES}
    values = {name: {key.name: code(describe(key.default) or '""') for key in keys[name]} for name in RECIPES}
    sections: dict[str, list[reference.Key]] = {}
    for key in keys["xl"]:
        sections.setdefault(key.name.rpartition(".")[0], []).append(key)
    parts = [INTRODUCTION]
    for section, members in sections.items():
        rows = [
            (code(key.name), escape(key.type), *(values[name][key.name] for name in COLUMNS), escape(key.meaning))
            for key in members
        ]
        parts += [f"## {section}\n", table(("key", "type", *COLUMNS, "meaning"), rows)]
    different = [name for name in values["xl"] if values["xl-mxfp8"][name] != values["xl"][name]]
    rows = [(code(name), values["xl"][name], values["xl-mxfp8"][name]) for name in different]
    return "\n".join([*parts, DIFFERENCES, table(("key", "xl", "xl-mxfp8"), rows)])
