"""The entry point: help, version and unknown commands."""

from importlib.metadata import version

import pytest

from jobs import launch
from jobs.commands import registry


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_without_a_command_the_help_is_shown_by_group(words, capsys):
    assert launch.main(words) == 0
    output = capsys.readouterr()
    assert not output.err
    sections = output.out.split("\n\n")
    for title, entries in registry.GROUPS.items():
        (section,) = [text for text in sections if text.startswith(f"{title}:\n")]
        lines = section.splitlines()[1:]
        assert [line.split()[0] for line in lines] == list(entries)
        for line, entry in zip(lines, entries.values(), strict=True):
            assert line.endswith(entry.summary)
            assert len(line) <= 100
    assert list(registry.GROUPS)[:4] == ["Data", "Training", "Results", "Runs"]


def test_version(capsys):
    assert launch.main(["--version"]) == 0
    assert capsys.readouterr().out == f"pixart-suite {version('pixart-suite')}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["captoin"], "unknown command 'captoin'; did you mean 'caption'?"),
        (["zzz"], "unknown command 'zzz'; run `python -m jobs.launch` to list the commands"),
        (["--verison"], "unknown option '--verison'; did you mean '--version'?"),
        (["--home", "x", "train"], "unknown option '--home'; the command goes before its options"),
    ],
)
def test_an_unknown_word_in_place_of_a_command(words, message, capsys):
    assert launch.main(words) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["caption", "--arary", "0-255"], "unknown option '--arary'; did you mean '--array'?"),
        (["caption", "--arary=0-255"], "unknown option '--arary'; did you mean '--array'?"),
        (["train", "--node", "4"], "unknown option '--node'; did you mean '--nodes'?"),  # options cannot be abbreviated
        (["sample", "done", "--export", "folder"], "unknown option '--export'; did you mean '--export-pipeline'?"),
        (["convert", "done", "--overwite"], "unknown option '--overwite'; did you mean '--overwrite'?"),
        (["status", "--zzz"], "unknown option '--zzz'; run `python -m jobs.launch status --help` to list them"),
        (["train", "now"], "unexpected argument 'now'; run `python -m jobs.launch train --help` for the usage"),
        (["train", "--nodes", "many"], "--nodes: 'many' is not a positive integer"),
        (["train", "--stage", "3"], "--stage: '3' is not one of 1, 2"),
        (["sample", "done", "--weights", "best"], "--weights: 'best' is not one of ema, master"),
        (["logs", "--shard", "x"], "--shard: 'x' is not the number of a shard"),
        (["train", "--nodes"], "--nodes: expected one argument"),
        (["train", "--resume", ""], "--resume: is empty; give a value, or leave the option out"),
    ],
)
def test_wrong_options(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        launch.main(words)
    assert stopped.value.code == 2
    assert capsys.readouterr().err == f"error: {message}\n"
