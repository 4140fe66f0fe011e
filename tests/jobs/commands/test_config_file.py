"""`--config FILE`: the precedence of its values, and the commands that accept it."""

import json
import os
from pathlib import Path

import pytest

from jobs import launch
from jobs.commands import registry
from jobs.commands.options import RecipeOptions, SubmissionOptions
from jobs.commands.training.convert import Options as ConvertOptions
from pixart.config.keys import toml_file
from pixart.config.recipe import from_json
from tests.support.environment import bare_environment

TEXT = """
recipe = "xl"
dataset = "from-file"
cluster = "local"
home = "home-of-file"

[stage1]
steps = 70
lr = 0.5

[sample]
steps = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Folder with `run.toml`, used as the current directory, in an environment without the suite's variables."""
    monkeypatch.chdir(tmp_path)
    for name in os.environ.keys() - bare_environment().keys():
        monkeypatch.delenv(name)
    for name, value in bare_environment().items():
        monkeypatch.setenv(name, value)
    (tmp_path / "run.toml").write_text(TEXT)
    return tmp_path


def dry_run(capsys, *words):
    """Return the recipe that `init` prints with `--dry-run`."""
    assert launch.main(["init", "--config", "run.toml", "--dry-run", *words]) == 0
    return from_json(capsys.readouterr().out)


def test_file_sets_options_missing_on_the_command_line(folder, capsys):
    recipe = dry_run(capsys)
    assert (recipe.name, recipe.data.path) == ("xl", str(folder / "from-file"))
    assert (recipe.stage1.steps, recipe.stage1.lr, recipe.sample.steps) == (70, 0.5, 3)
    assert recipe.stage2.steps == 300_000  # the value of the recipe


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--set", "stage1.steps=9"], {"steps": 9, "lr": 0.5}),
        (["--recipe", "demo"], {"name": "demo", "steps": 70}),
        (["--dataset", "mine"], {"dataset": "mine"}),
        (["--set", "data.path=/mine"], {"dataset": "/mine"}),
        (["--dataset", "s3://bucket/mine"], {"dataset": "s3://bucket/mine"}),
    ],
)
def test_the_command_line_wins(folder, capsys, words, expected):
    recipe = dry_run(capsys, *words)
    default = {"name": "xl", "dataset": "from-file", "steps": 70, "lr": 0.5}
    wanted = {**default, **expected}
    dataset = wanted["dataset"] if "://" in wanted["dataset"] else str(folder / wanted["dataset"])
    assert (recipe.name, recipe.data.path) == (wanted["name"], dataset)
    assert (recipe.stage1.steps, recipe.stage1.lr) == (wanted["steps"], wanted["lr"])


def test_a_dataset_among_the_keys_of_a_file(folder, capsys):
    (folder / "run.toml").write_text('[data]\npath = "/by-key"\n')
    assert dry_run(capsys).data.path == "/by-key"
    assert dry_run(capsys, "--dataset", "/mine").data.path == "/mine"


def test_the_cluster_of_the_file_is_used_unless_another_is_named(folder, capsys):
    (folder / "run.toml").write_text('cluster = "nowhere"\n')
    words = ["init", "--config", "run.toml", "--dry-run"]
    assert launch.main(words) == 2
    assert "unknown cluster profile 'nowhere'" in capsys.readouterr().err
    assert launch.main([*words, "--cluster", "local"]) == 0


@pytest.mark.parametrize("name", registry.ENTRIES)
def test_every_command_takes_a_file(name):
    file = toml_file.load("run.toml")
    required = {"adopt": 1, "sample": 1, "convert": 1, "release": 1, "serve": 1, "compare": 2}
    number = required.get(name, 0)
    words = [name, *["argument"] * number]
    options = launch.parse_command(words)[1].with_run_file(file)
    assert options.home == "home-of-file"
    assert type(options) is registry.load(name)[0].options
    if isinstance(options, RecipeOptions):
        assert (options.recipe, options.dataset) == ("xl", "from-file")
        assert options.overrides == ("stage1.steps=70", "stage1.lr=0.5", "sample.steps=3")
    if isinstance(options, SubmissionOptions):
        assert options.cluster == "local"
    assert launch.parse_command([*words, "--home", "mine"])[1].with_run_file(file).home == "mine"


def test_convert_calibrates_on_the_dataset_of_the_file():
    file = toml_file.load("run.toml")
    for words, expected in (([], "from-file"), (["--dataset", "mine"], "mine")):
        options = launch.parse_command(["convert", "checkpoint", *words])[1].with_run_file(file)
        assert isinstance(options, ConvertOptions)
        assert options.conversion.calibration_dataset == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe =", "run.toml: is not TOML"),
        ('resipe = "xl"', "run.toml: resipe: unknown key; did you mean recipe?"),
        ("[stage1]\nsteps = 1.5", "stage1.steps"),
        ("[stage1]\nstep = 1", "stage1.step: unknown key"),
        (None, "nowhere.toml: cannot be read"),
        ('home = "s3://bucket/home"', "a folder of a file system"),
    ],
)
@pytest.mark.parametrize("command", ["train", "status"])
def test_invalid_file_is_refused_in_one_line_with_nothing_written(folder, capsys, command, text, message):
    (folder / "run.toml").write_text(text or TEXT)
    before = sorted(folder.rglob("*"))
    assert launch.main([command, "--config", "run.toml" if text else "nowhere.toml"]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


def test_the_file_that_config_prints_is_one_that_it_reads(folder, capsys):
    assert launch.main(["config", "--toml", "--recipe", "demo", "--set", "stage1.steps=9"]) == 0
    text = capsys.readouterr().out
    (folder / "run.toml").write_text(text)
    assert launch.main(["config", "--toml", "--config", "run.toml"]) == 0
    assert capsys.readouterr().out == text
    recipe = dry_run(capsys)
    assert (recipe.name, recipe.stage1.steps) == ("demo", 9)


def test_config_lists_every_key(capsys):
    assert launch.main(["config", "--recipe", "xl", "--set", "stage1.steps=9", "--home", "home"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["key", "type", "default", "meaning"]
    assert launch.main(["init", "--recipe", "xl", "--set", "stage1.steps=9", "--home", "home", "--dry-run"]) == 0
    values = json.loads(capsys.readouterr().out)
    keys = [line.split()[0] for line in lines]
    assert len(set(keys)) == len(keys) == count_leaves({**values, "name": {}})
    assert {"stage1.steps", "data.screening.min_side", "sample.guidance", "audit.max_rejected", "model.dim"} <= set(
        keys
    )
    (steps,) = [line for line in lines if line.startswith("stage1.steps ")]
    assert " 9 " in steps
    for line in lines:
        assert len(line.split("  ")) >= 4, line  # including a description


def count_leaves(values) -> int:
    return sum(map(count_leaves, values.values())) if isinstance(values, dict) else 1
