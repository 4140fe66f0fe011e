"""The report of `doctor`: on a bare machine, and with each missing piece."""

import dataclasses
import re
import sys

import pytest

from jobs import launch
from jobs.commands.doctor import scheduler, software, storage
from pixart.recipes import demo, xl
from slurm import profile as profiles

LOCAL = profiles.load("local")


@pytest.fixture
def doctor(monkeypatch, tmp_path, capsys):
    """Callable that runs `doctor` for the local profile, and returns its exit code and its lines by subject."""
    monkeypatch.setenv("PIXART_CLUSTER", "local")

    def run(*words: str) -> tuple[int, dict[str, tuple[str, str]]]:
        code = launch.main(["doctor", "--home", str(tmp_path / "home"), *words])
        lines = capsys.readouterr().out.splitlines()
        matches = [re.fullmatch("(ok|missing|unknown) +(.*?): (.*)", line) for line in lines[:-1]]
        return code, {match[2]: (match[1], match[3]) for match in matches if match}

    return run


def test_nothing_is_missing_for_the_demo_on_a_bare_machine(doctor, tmp_path):
    code, lines = doctor()
    assert code == 0
    assert {state for state, _ in lines.values()} <= {"ok", "unknown"}
    assert {"Slurm", "torch", "space"} <= set(lines)
    assert list(tmp_path.iterdir()) == []


def test_models_and_vllm_are_missing_for_the_recipe_xl(doctor, monkeypatch, tmp_path):
    """The cache of the hub is empty; each missing piece is one line with what to do."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    code, lines = doctor("--recipe", "xl")
    assert code == 2
    for key in ("data.vae", "data.text_encoder", "data.caption_model"):
        assert lines[key][0] == "missing"
        assert "run 'doctor --fetch'" in lines[key][1]
    assert lines["vllm"] == ("missing", f"not installed for caption; run '{sys.executable} -m pip install vllm'")


def test_a_local_model_needs_its_weights(doctor, tmp_path):
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    code, lines = doctor("--set", f"data.vae={folder}")
    assert code == 2
    assert "has no weights" in lines["data.vae"][1]
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    (folder / "1.safetensors").touch()
    assert doctor("--set", f"data.vae={folder}")[0] == 2
    (folder / "2.safetensors").touch()
    (folder / "README.md").write_text("---\ntags: [vae]\nlicense: mit\n---\ntext\n")
    code, lines = doctor("--set", f"data.vae={folder}")
    assert code == 0
    assert lines["data.vae"] == ("ok", f"{folder}, licence mit")


def states(findings) -> dict[str, tuple[str, str]]:
    return {finding.subject: (finding.state, finding.text) for finding in findings}


def test_an_interpreter_that_does_not_start():
    profile = dataclasses.replace(LOCAL, python={"caption": "/nowhere/python"})
    results = states(software.check(profile, demo("home")))
    assert results["environment of caption"][0] == "missing"
    assert "/nowhere/python does not start" in results["environment of caption"][1]
    profile = dataclasses.replace(LOCAL, setup=["echo no such module >&2; exit 1"])
    (result,) = software.check(profile, demo("home"))
    assert "(no such module)" in result.text


def test_transformer_engine_and_cuda(monkeypatch):
    recipe = dataclasses.replace(
        demo("home"), stage2=dataclasses.replace(demo("home").stage2, fp8_recipe="mxfp8", fp8=True)
    )
    results = states(software.check(dataclasses.replace(LOCAL, gpus_per_node=8), recipe))
    assert "not installed for train" in results["transformer-engine"][1]
    assert (results["CUDA"][0] == "missing") == ("without CUDA" in results["CUDA"][1])
    assert software.check_cuda("2.13.0", "12.8").state == "ok"


def test_a_package_outside_of_the_tested_versions(monkeypatch):
    required = ["numpy<1", 'vllm>=0.33; extra == "vllm"', "ruff<0.18; extra == 'dev'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: required)
    assert {name: str(item.specifier) for name, item in software.tested_ranges().items()} == {
        "numpy": "<1",
        "vllm": ">=0.33",
    }
    results = states(software.check(LOCAL, demo("home")))
    assert "outside of the tested versions <1" in results["numpy"][1]


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ("/blue 1000 2000 3000 - 5 0 0 -", 1000 * 1024),  # in KiB; the soft limit counts
        ("/blue 1.5T 0k 2T -", 0.5 * 1024**4),
        ("/blue 12* 10 11 6days", 0),
        ("/blue 12 0 0 -", None),  # no limit
        ("Disk quotas for user a (uid 5):", None),
        ("/dev/sda1 blocks quota limit", None),
    ],
)
def test_quota_listings(line: str, left: float | None):
    assert storage.left_of(line) == left


def test_a_quota_that_is_too_small(programs, tmp_path):
    programs(lfs="echo '/blue 90 100 100 - 1 0 0 -'")
    results = states(storage.check(xl(str(tmp_path)), tmp_path))
    assert results["quota"][0] == "missing"
    assert "of the recipe" not in results["quota"][1]
    programs(lfs="exit 1", quota="echo '/dev/sda1 1 5000000000 5000000000'")
    assert states(storage.check(xl(str(tmp_path)), tmp_path))["quota"][0] == "ok"


def test_a_refusal_of_slurm_is_reported(programs, tmp_path):
    programs(sinfo="echo 'main*|1-00:00:00|n1|gpu:b200:8'", sbatch="echo 'sbatch: error: Invalid account' >&2; exit 1")
    results = states(scheduler.check(profiles.load("dev"), tmp_path))
    assert len(results) == 6
    assert set(results.values()) == {("missing", "sbatch: Invalid account; correct the profile dev")}
    programs(sbatch="echo 'sbatch: error: Unable to contact slurm controller (connect failure)' >&2; exit 1")
    assert {state for state, _ in states(scheduler.check(profiles.load("dev"), tmp_path)).values()} == {"unknown"}
