"""Construction of the argparse parser of a command from the dataclass of its options.

Only this module reads an argparse.Namespace; `parse` returns typed options.
"""

import argparse
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin, get_type_hints

from jobs.commands.options import METADATA, CommonOptions, Delegated, Option, nonempty
from jobs.commands.registry import did_you_mean

Parsed = TypeVar("Parsed", bound=CommonOptions)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, and name the closest known option for an unknown one."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message.removeprefix('argument ')}\n")

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """Parse the words, and exit with code 2 and one line for an unknown option or argument."""
        namespace, unknown = self.parse_known_args(words)
        for word in unknown:
            name = word.partition("=")[0]
            if word.startswith("-"):
                hint = did_you_mean(name, self._option_string_actions) or f"run `{self.prog} --help` to list them"
                self.error(f"unknown option {name!r}; {hint}")
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}; run `{self.prog} --help` for the usage")
        return namespace


def parse(kind: type[Parsed], words: Sequence[str], *, program: str, description: str) -> Parsed:
    """Parse the words of a command line after the command. Exits with code 2 and one line for an invalid one."""
    namespace = make_parser(kind, program, description).parse(words)
    values: dict[str, Any] = {}
    for item in dataclasses.fields(kind):
        declared = item.metadata[METADATA]
        if declared is None:
            continue
        if isinstance(declared, Delegated):
            values[item.name] = declared.read(namespace)
        else:
            value = getattr(namespace, item.name)
            values[item.name] = tuple(value or ()) if is_repeatable(get_type_hints(kind)[item.name]) else value
    return kind(**values)


def make_parser(kind: type[CommonOptions], program: str, description: str) -> Parser:
    """Return the parser of a command: first the options of the command alone, then the groups of shared options."""
    hints = get_type_hints(kind)
    items = {item.name: item for item in dataclasses.fields(kind)}
    names = [name for name in items if items[name].metadata[METADATA]]
    positional = [name for name in names if is_positional(items[name])]
    usage = " ".join([program, *(usage_of(items[name], hints[name]) for name in positional), "[OPTION ...]"])
    parser = Parser(
        prog=program,
        usage=usage,
        description=description,
        add_help=False,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for owner in kind.__mro__:
        declared = [name for name in inspect.get_annotations(owner) if name in names]
        shared = vars(owner).get("TITLE")
        group = parser.add_argument_group(shared) if shared else parser
        for name in declared:
            specification = items[name].metadata[METADATA]
            if isinstance(specification, Delegated):
                specification.add(parser)
            else:
                to = parser if name in positional else group
                to.add_argument(
                    *(specification.flags or [name]),
                    **keywords(name, specification, hints[name], items[name].default),
                )
        if owner is CommonOptions:
            group.add_argument("-h", "--help", action="help", help="Show this message and exit.")
    return parser


def is_positional(item: dataclasses.Field[Any]) -> bool:
    declared = item.metadata[METADATA]
    return isinstance(declared, Option) and not declared.flags


def is_repeatable(hint: Any) -> bool:
    return get_origin(hint) is tuple


def is_optional(hint: Any) -> bool:
    return get_origin(hint) in (typing.Union, types.UnionType)


def usage_of(item: dataclasses.Field[Any], hint: Any) -> str:
    """Return the notation of a positional argument in the usage line."""
    name = item.metadata[METADATA].metavar
    return f"[{name} ...]" if is_repeatable(hint) else f"[{name}]" if is_optional(hint) else name


def keywords(name: str, declared: Option, hint: Any, default: Any) -> dict[str, Any]:
    """Return the arguments of `add_argument` for a field, from its declaration and its annotation."""
    arguments: dict[str, Any] = {"help": declared.help.replace("%", "%%")}
    if declared.flags:
        arguments |= {"dest": name, "default": default}
    if hint is bool:
        return {**arguments, "action": "store_true"}
    arguments["metavar"] = declared.metavar
    kind = get_args(hint)[0] if is_repeatable(hint) or is_optional(hint) else hint
    if is_repeatable(hint):
        arguments |= {"action": "append", "default": None} if declared.flags else {"nargs": "*"}
    elif not declared.flags and is_optional(hint):
        arguments["nargs"] = "?"
    convert = declared.convert or (one_of(get_args(kind)) if get_origin(kind) is Literal else nonempty)
    return {**arguments, "type": reported(convert)}


def one_of(choices: Sequence[Any]) -> Callable[[str], Any]:
    """Return a converter from text to one of the choices. It raises ValueError for any other text."""
    by_text = {str(choice): choice for choice in choices}

    def convert(text: str) -> Any:
        if text not in by_text:
            raise ValueError(f"{text!r} is not one of {', '.join(by_text)}")
        return by_text[text]

    return convert


def reported(convert: Callable[[str], Any]) -> Callable[[str], Any]:
    """Wrap a converter so that argparse prints the message of its ValueError, which it omits otherwise."""

    def converter(text: str) -> Any:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return converter
