"""List every configuration key, or print a recipe as TOML.

Set a key with --set KEY=VALUE in the commands that have this option, or in a file that every command reads with
--config FILE.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from jobs.commands.launching import read_recipe
from jobs.commands.options import Command, RecipeOptions, option
from jobs.state import run as runs
from pixart.config.keys import reference, toml_file
from pixart.terminal import printable

MAX_LENGTH = 60  # characters of a value; --toml prints the whole text
HEADER = ("key", "type", "default", "meaning")


@dataclass(frozen=True, kw_only=True)
class Options(RecipeOptions):
    """The options of `config`."""

    toml: bool = option(
        "--toml", default=False, help="Print the recipe as TOML, for --config (default: print a table of the keys)."
    )


def run(options: Options) -> int:
    recipe = read_recipe(runs.home(options.home), options)
    if options.toml:
        print(toml_file.dumps(recipe, meanings=True), end="")
        return 0
    rows = [(key.name, key.type, describe(key.default), key.meaning) for key in reference.keys(recipe)]
    if sys.stdout.isatty():
        print_table(rows)
    else:
        print_lines(rows)
    return 0


def describe(value: object) -> str:
    """Return a value in the notation of --set; a long text is shortened."""
    if isinstance(value, tuple):
        return ",".join(map(describe, value))
    text = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return printable(text if len(text) <= MAX_LENGTH else f"{' '.join(text.split())[: MAX_LENGTH - 3]}...")


def print_table(rows: Iterable[Sequence[str]]) -> None:
    """Print the table to the width of the terminal, with wrapped cells."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in HEADER:
        table.add_column(name, overflow="fold", no_wrap=name == "key")
    for row in rows:
        table.add_row(*map(Text, row))
    Console(highlight=False).print(table)


def print_lines(rows: list[tuple[str, str, str, str]]) -> None:
    """Print the table with a line for each key, for `grep` and files."""
    lines = [HEADER, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER) - 1)]
    for *cells, meaning in lines:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), meaning]))


COMMAND = Command(Options, run)
