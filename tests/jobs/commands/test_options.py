"""The typed options of every command, their parsers and their help."""

import argparse
import ast
import dataclasses
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from jobs import launch
from jobs.commands import registry
from jobs.commands.options import METADATA, CommonOptions, Delegated, Option
from jobs.commands.parsing import make_parser
from jobs.commands.results.sample import Options as SampleOptions
from jobs.commands.runs.logs import Options as LogsOptions
from jobs.commands.training.train import Options as TrainOptions

COMMANDS = Path(launch.__file__).parent / "commands"
NAMES = list(registry.ENTRIES)


def fields_of(name: str) -> dict[str, tuple[dataclasses.Field, Any, Option]]:
    """Return the fields of a command's options with their types, except those that another package declares."""
    kind = registry.load(name)[0].options
    hints = get_type_hints(kind)
    return {
        item.name: (item, hints[item.name], item.metadata[METADATA])
        for item in dataclasses.fields(kind)
        if isinstance(item.metadata[METADATA], Option)
    }


def value_type(hint: Any) -> Any:
    """Return the type of one value of a field."""
    repeatable_or_optional = get_origin(hint) in (tuple, typing.Union, types.UnionType)
    return get_args(hint)[0] if repeatable_or_optional else hint


def sample_words(hint: Any) -> tuple[str, Any]:
    """Return a word of the command line and the value that it stands for."""
    kind = value_type(hint)
    if get_origin(kind) is Literal:
        choice = get_args(kind)[-1]
        return str(choice), choice
    return {int: ("3", 3), float: ("0.5", 0.5), str: ("word", "word"), tuple[int, int]: ("64x48", (48, 64))}[kind]


@pytest.mark.parametrize("name", NAMES)
def test_options_match_their_parser(name):
    """Every field has an option that parses to its annotated type, and without options every field has its default."""
    fields = fields_of(name)
    required = [item for item, hint, declared in fields.values() if not declared.flags and hint is str]
    words = [name, *("word" for _ in required)]
    _, defaults = launch.parse_command(words)
    assert isinstance(defaults, CommonOptions)
    for field, (item, hint, declared) in fields.items():
        if declared.flags:
            assert item.default is not dataclasses.MISSING
            assert getattr(defaults, field) == item.default, field
            assert type(item.default) in (type(None), bool, int, float, str, tuple)
        for flag in declared.flags:
            if hint is bool:
                _, parsed = launch.parse_command([*words, flag])
                assert getattr(parsed, field) is True
                continue
            text, value = sample_words(hint)
            repeated = get_origin(hint) is tuple
            _, parsed = launch.parse_command([*words, flag, text, *([flag, text] if repeated else [])])
            assert getattr(parsed, field) == ((value, value) if repeated else value), field
            others = [other for other in fields if other != field]
            assert [getattr(parsed, other) for other in others] == [getattr(defaults, other) for other in others]
        if not declared.flags:
            empty = () if get_origin(hint) is tuple else "word" if hint is str else None
            assert getattr(defaults, field) == empty, field


@pytest.mark.parametrize("name", NAMES)
def test_parser_has_no_option_without_a_field(name):
    kind = registry.load(name)[0].options
    parser = make_parser(kind, name, "")
    delegated = argparse.ArgumentParser(add_help=False)
    for item in dataclasses.fields(kind):
        if isinstance(item.metadata[METADATA], Delegated):
            item.metadata[METADATA].add(delegated)
    flags = {flag for _, _, declared in fields_of(name).values() for flag in declared.flags}
    expected = flags | set(delegated._option_string_actions) | {"-h", "--help"}
    assert set(parser._option_string_actions) == expected


def test_values_are_typed():
    _, train = launch.parse_command(["train", "--stage", "2", "--from", "start", "--set", "a=1", "--set", "b=2"])
    assert isinstance(train, TrainOptions)
    assert (train.stage, train.start, train.overrides, train.nodes) == (2, "start", ("a=1", "b=2"), 1)
    _, sample = launch.parse_command(["sample", "done", "--prompt", "", "--class", "none", "--per-prompt", "3"])
    assert isinstance(sample, SampleOptions)
    assert (sample.prompts, sample.classes, sample.images_per_prompt) == (("",), ("none",), 3)
    _, logs = launch.parse_command(["logs", "--shard", "0", "-f"])
    assert isinstance(logs, LogsOptions)
    assert (logs.shard, logs.follow, logs.run) == (0, True, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        logs.shard = 1  # type: ignore[misc]


@pytest.mark.parametrize("name", NAMES)
def test_help_of_options_is_complete(name):
    """A sentence with its default for each option, and a metavar in capitals for each value."""
    for field, (item, hint, declared) in fields_of(name).items():
        assert declared.help[0].isupper(), field
        assert declared.help.endswith("."), field
        if declared.flags:
            assert "(default: " in declared.help, field
        if hint is bool:
            assert declared.metavar is None
            continue
        assert declared.metavar, field
        assert re.fullmatch(r"[A-Z][A-Zx/|=]*", declared.metavar), declared.metavar
        if declared.flags and item.default not in (None, ()):
            assert f"(default: {item.default})" in declared.help, field


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_command(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        launch.main([name, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: python -m jobs.launch {name} ")
    assert registry.ENTRIES[name].summary in text


@pytest.mark.parametrize("name", NAMES)
def test_a_summary_is_the_first_line_of_the_module(name):
    _, description = registry.load(name)
    assert description.splitlines()[0] == registry.ENTRIES[name].summary
    assert registry.ENTRIES[name].summary.endswith(".")


def test_every_command_is_in_one_group_and_one_module():
    modules = [entry.module for entry in registry.ENTRIES.values()]
    assert len(set(modules)) == len(modules) == sum(len(group) for group in registry.GROUPS.values())
    with_command = {
        ".".join(path.relative_to(COMMANDS).with_suffix("").parts)
        for path in COMMANDS.rglob("*.py")
        if re.search(r"^COMMAND = ", path.read_text(), re.MULTILINE)
    }
    assert with_command == set(modules)


def test_only_the_parser_knows_argparse():
    """Everything else reads typed options: no other module imports argparse or names its Namespace."""
    users = set()
    for path in [*COMMANDS.rglob("*.py"), *(COMMANDS.parent / "submission").rglob("*.py"), Path(launch.__file__)]:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            modules |= {node.module} if isinstance(node, ast.ImportFrom) else set()
            is_namespace = isinstance(node, ast.Attribute | ast.Name) and "Namespace" in ast.unparse(node)
            if "argparse" in modules or is_namespace:
                users.add(path.name)
    assert users == {"parsing.py"}


def test_no_module_compares_with_names_of_commands():
    """What a command does is decided by its own module, not by a branch on its name."""
    for path in [*COMMANDS.rglob("*.py"), COMMANDS.parent / "launch.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                parts = list(ast.walk(node))
                words = {item.value for item in parts if isinstance(item, ast.Constant)}
                names = {item.attr for item in parts if isinstance(item, ast.Attribute)}
                names |= {item.id for item in parts if isinstance(item, ast.Name)}
                is_branch = words & set(NAMES) and names & {"command", "job", "name"}
                assert not is_branch, f"{path}: {ast.unparse(node)}"
