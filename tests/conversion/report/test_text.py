"""The command that trains a converted checkpoint."""

import shlex

import pytest

from conversion.options import Options
from conversion.report.text import next_command
from jobs import launch


@pytest.mark.parametrize(
    ("options", "dataset", "expected"),
    [
        (Options(), "data", ["--stage", "2", "--from", "a b.fp8"]),
        (Options(stage=1), "data", ["--stage", "1", "--from", "a b.fp8", "--set", "stage1.fp8=true"]),
        (Options(), None, ["--stage", "2", "--from", "a b.fp8", "--dataset", "DATASET"]),
        (Options(calibration_dataset="o'data"), None, ["--stage", "2", "--from", "a b.fp8", "--dataset", "o'data"]),
        (Options(calibration_dataset="other"), "data", ["--stage", "2", "--from", "a b.fp8", "--dataset", "other"]),
    ],
)
def test_the_command_names_options_that_the_checkpoint_does_not_record(options, dataset, expected):
    words = shlex.split(next_command(options, "a b.fp8", dataset))
    assert words == ["python", "-m", "jobs.launch", "train", *expected]
    launch.parse_command(words[3:])


def test_weight_decay_of_the_norms_of_queries_and_keys_goes_on():
    command = next_command(Options(stage=1), "a.fp8", "data", decay_qk_norm=True)
    assert command.endswith(" --set stage1.fp8=true --set stage1.decay_qk_norm=true")
    command = next_command(Options(), "a.fp8", "data", decay_qk_norm=True)
    assert command.endswith("--from a.fp8 --set stage2.decay_qk_norm=true")


def test_the_home_of_the_run_is_named_unless_it_is_the_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PIXART_HOME", raising=False)
    for home in ("my home", "outputs"):
        run = tmp_path / home / "runs/a-train"
        run.mkdir(parents=True)
        (run / "config.json").write_text("{}")
        command = next_command(Options(), f"{home}/runs/a-train/checkpoints/step-00000003.fp8", "data")
        assert command.endswith(f" --home '{tmp_path}/my home'") == (home == "my home")
        assert ("--home" in command) == (home == "my home")
    monkeypatch.setenv("PIXART_HOME", str(tmp_path / "my home"))
    assert "--home" not in next_command(Options(), tmp_path / "my home/runs/a-train/checkpoints/step-3.fp8", "data")
