"""The command reference, from the parsers of all commands."""

import argparse
import dataclasses
from collections.abc import Iterator

from conversion import to_bf16, to_fp8
from jobs.commands import registry
from jobs.commands.options import METADATA, CommonOptions, RecipeOptions, SubmissionOptions
from jobs.commands.parsing import Parser, make_parser
from slurm.devcluster import __main__ as devcluster
from tests.support.documentation.markdown import code, escape, table

HEADER = ("option", "meaning")
SHARED = (RecipeOptions, SubmissionOptions, CommonOptions)
INTRODUCTION = """# Commands

`python -m jobs.launch COMMAND --help` prints the same for one command. Options are written in full; an unknown option
is refused with the nearest known one. The commands of the launcher come first, then the programs beside it.
"""


def page() -> str:
    """Return the page of all commands, options and arguments."""
    parts = [INTRODUCTION, "## Shared options\n", "Several commands take these groups of options.\n"]
    for owner in SHARED:
        parts += [f"### {title(owner)}\n", table(HEADER, rows(parser_of_group(owner)))]
    for group, entries in registry.GROUPS.items():
        parts.append(f"## {group}\n")
        for name in entries:
            parts += launcher_command(name)
    parts.append("## Programs beside the launcher\n")
    for parser in (to_fp8.make_parser(), to_bf16.make_parser(), devcluster.make_parser()):
        parts += [f"### {parser.prog}\n", f"{escape(parser.description or '')}\n", table(HEADER, rows(parser))]
    return "\n".join(parts)


def launcher_command(name: str) -> list[str]:
    """Return the parts of the page about one command of the launcher."""
    command, description = registry.load(name)
    parser = make_parser(command.options, f"{registry.PROGRAM} {name}", description)
    owners = [owner for owner in SHARED if issubclass(command.options, owner)]
    shared = {action.dest for owner in owners for action in actions(parser_of_group(owner))}
    usage = parser.format_usage().removeprefix("usage: ").strip()
    parts = [f"### {name}\n", f"    {usage}\n", f"{escape_paragraphs(description)}\n"]
    if special := list(rows(parser, without=shared)):
        parts.append(table(HEADER, special))
    links = [f"[{title(owner).lower()}](#{title(owner).lower().replace(' ', '-')})" for owner in owners]
    return [*parts, f"It also takes the {joined(links)}.\n"]


def parser_of_group(owner: type[CommonOptions]) -> Parser:
    """Return a parser of the options that a group of shared options declares itself, without those of its bases."""
    parser = make_parser(owner, "", "")
    inherited = {item.name for base in owner.__mro__[1:] if dataclasses.is_dataclass(base) for item in fields(base)}
    declared = {item.name for item in fields(owner)} - inherited
    is_common = owner is CommonOptions
    parser._actions = [item for item in actions(parser) if item.dest in declared or (is_common and item.dest == "help")]
    return parser


def fields(owner: type) -> list[dataclasses.Field]:
    """Return the fields of a dataclass that are written on the command line."""
    return [item for item in dataclasses.fields(owner) if item.metadata.get(METADATA)]


def title(owner: type[CommonOptions]) -> str:
    """Return the heading of a group of shared options."""
    name = str(vars(owner)["TITLE"]).capitalize()
    return name if name.endswith("options") else f"{name} options"


def actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return the options and arguments of a parser. Argparse has no public name for them."""
    return parser._actions


def rows(parser: argparse.ArgumentParser, without: set[str] | None = None) -> Iterator[tuple[str, str]]:
    """Yield the notation and the help of each option and argument, except for those with a name in `without`."""
    formatter = parser._get_formatter()
    for action in actions(parser):
        if action.dest not in (without or ()):
            yield code(notation(action)), escape(formatter._expand_help(action))


def notation(action: argparse.Action) -> str:
    """Return how an option or argument is written, such as `--nodes N`."""
    choices = "|".join(map(str, action.choices)) if action.choices else ""
    value = action.metavar if isinstance(action.metavar, str) else choices or action.dest.upper()
    if not action.option_strings:
        return value
    return ", ".join(action.option_strings) + ("" if action.nargs == 0 else f" {value}")


def escape_paragraphs(text: str) -> str:
    return "\n\n".join(escape(part) for part in text.split("\n\n"))


def joined(words: list[str]) -> str:
    """Return words as an enumeration with "and" before the last."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
