"""The command that comes next: which options it carries, and that it parses to the same values."""

import shlex
from pathlib import Path

import pytest

from jobs import launch
from jobs.commands.hints import describe_submission, next_command
from jobs.commands.options import CommonOptions
from jobs.commands.training.train import conversion_command
from jobs.state.run import Run
from jobs.submission.launch import Launch
from pixart.config.keys import toml_file
from pixart.recipes import RECIPES
from slurm import profile as profiles

FILE = """
recipe = "xl"
home = "there"
cluster = "local"

[stage1]
steps = 7
"""


def options_of(*words: str) -> CommonOptions:
    """Return the effective options of a command line, as `launch.run` makes them."""
    _, options = launch.parse_command(list(words))
    return options.with_run_file(toml_file.load(options.config)) if options.config else options


def test_defaults_are_not_repeated():
    assert next_command(options_of("audit"), "train", "--stage", "1") == "python -m jobs.launch train --stage 1"
    assert next_command(options_of("status"), "open", "some-run") == "python -m jobs.launch open some-run"
    assert next_command(options_of("train"), "sample", "last", recipe="demo") == "python -m jobs.launch sample last"


def test_every_option_that_the_next_command_has_is_carried():
    words = ["--recipe", "xl", "--home", "my home", "--dataset", "s3://bucket/it's", "--cluster", "c.toml"]
    words += ["--gpus-per-node", "2", "--set", "stage1.steps=7", "--set", "data.source=a b"]
    before = options_of("latents", *words, "--array", "0-3")
    line = next_command(before, "audit")
    after = options_of(*shlex.split(line)[3:])
    for name in ("recipe", "home", "dataset", "cluster", "gpus_per_node", "overrides"):
        assert getattr(after, name) == getattr(before, name), name
    assert "--array" not in line
    assert shlex.split(next_command(before, "lineage", "run"))[3:] == ["lineage", "run", "--home", "my home"]
    sampling = next_command(before, "sample", "last", sections=("data.", "sample."))
    assert "data.source" in sampling
    assert "stage1.steps" not in sampling


def test_values_of_a_configuration_file_are_given_by_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run file.toml").write_text(FILE)
    (tmp_path / "steps.toml").write_text("[stage1]\nsteps = 7\n")
    before = options_of("caption", "--config", "run file.toml", "--set", "stage1.lr=0.5")
    line = next_command(before, "latents")
    assert line == "python -m jobs.launch latents --config 'run file.toml' --set stage1.lr=0.5"
    after = options_of(*shlex.split(line)[3:])
    assert (after.recipe, after.home, after.cluster, after.overrides) == ("xl", "there", "local", before.overrides)
    assert next_command(before, "status", "run") == "python -m jobs.launch status run --config 'run file.toml'"
    steps = options_of("caption", "--config", "steps.toml")
    assert next_command(steps, "status", "run") == "python -m jobs.launch status run"  # the file names no home
    assert next_command(steps, "latents") == "python -m jobs.launch latents --config steps.toml"
    won = options_of("caption", "--config", "run file.toml", "--home", "here", "--recipe", "demo")
    assert next_command(won, "open", "run").endswith("launch open run --home here")


def test_a_conversion_is_followed_by_training_with_the_configuration_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text("[stage2]\nsteps = 7\n")
    before = options_of("convert", "last", "--config", "run.toml", "--home", "there")
    line = next_command(before, "train", "--from", "last.fp8")
    assert line == "python -m jobs.launch train --from last.fp8 --config run.toml --home there"


@pytest.mark.parametrize("recipe", ["xl", "xl-mxfp8"])
def test_a_recipe_that_the_command_chose_is_named(recipe):
    assert next_command(options_of("train", "--from", "x"), "sample", "last", recipe=recipe).endswith(
        f"sample last --recipe {recipe}"
    )
    assert "--recipe demo" in next_command(options_of("train", "--recipe", "demo"), "sample", "last", recipe=recipe)


def test_a_submission_is_followed_by_its_status():
    run = Run(folder=Path("h/runs/a-train"), kind="train", executor="slurm", dataset="d", total=1, jobs=(("7", ()),))
    text = describe_submission(options_of("train", "--home", "h", "--set", "stage1.steps=7", "--cluster", "dev"), run)
    assert text == (
        "submitted train as 7; run folder h/runs/a-train\nnext: python -m jobs.launch status a-train --home h"
    )


@pytest.mark.parametrize(
    ("recipe", "words", "expected"),
    [
        ("xl", [], "python -m conversion.to_fp8 'a b'"),
        ("xl-mxfp8", [], "python -m conversion.to_fp8 'a b' --fp8-recipe mxfp8"),
        (
            "xl-mxfp8",
            ["--cluster", "local", "--home", "there", "--set", "stage1.steps=7"],
            "python -m jobs.launch convert 'a b' --fp8-recipe mxfp8 --home there --cluster local",
        ),
    ],
)
def test_stage_1_is_followed_by_a_conversion_with_the_recipe_of_stage_2(tmp_path, recipe, words, expected):
    submission = Launch(
        home=tmp_path, command="train", recipe=RECIPES[recipe](str(tmp_path)), profile=profiles.load("local")
    )
    assert conversion_command(submission, options_of("train", *words), "a b") == expected
