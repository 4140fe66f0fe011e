"""`estimate` on a finished demo: its figures are those of the files on disk."""

import re
from pathlib import Path

import pytest

from jobs.submission import estimates
from pixart.config.recipe import from_json
from tests.support.demo_fixture import SETTINGS, STEPS, Demo

UNITS = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
SIZE = re.compile(r"([\d.,]+) (bytes|kB|MB|GB|TB)")


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def sizes(line: str) -> list[float]:
    return [float(number.replace(",", "")) * UNITS[unit] for number, unit in SIZE.findall(line)]


def test_figures_are_those_of_the_machine_and_of_the_formulas(capsys, tmp_path):
    from jobs import launch

    words = ["--recipe", "xl", "--set", "data.source=/data", "--set", "data.max_images=14000000", "--home", tmp_path]
    assert launch.run(["estimate", *map(str, words), "--card", "H100", "--utilization", "0.5", "--gpus", "10"]) == 0
    lines = {line.split("  ")[0]: line for line in capsys.readouterr().out.splitlines() if line}

    assert sizes(lines["latents"])[0] == pytest.approx(14e6 * (32 * 1024 + 128 * 5 + 5 + 60), rel=0.01)
    assert "unknown" in lines["caption"]
    assert "no shard is finished" in lines["caption"]
    steps, images, operations = re.findall(r"[\d,.]+", lines["stage 1, BF16"].removeprefix("stage 1, BF16"))[:3]
    assert (steps, images) == ("400,000", "819,200,000")
    hours = float(operations) * 1e12 * 819_200_000 / (989.4e12 * 0.5) / 3600
    assert re.search(rf"TFLOP +{hours:,.0f} +{hours / 10:.3g} ", lines["stage 1, BF16"])


@pytest.mark.slow
def test_bytes_are_within_5_percent_of_those_of_a_demo(small_demo: Demo):
    done = small_demo.command("estimate", *(word for value in SETTINGS for word in ("--set", value)))
    assert done.returncode == 0, done.stderr
    lines = {line.split("  ")[0]: line for line in done.stdout.splitlines() if line}
    dataset = small_demo.home / "datasets" / "demo"

    assert sizes(lines["caption"])[0] == pytest.approx(folder_bytes(dataset / "captions"), rel=0.05)
    assert sizes(lines["latents"])[0] == pytest.approx(folder_bytes(dataset / "latents.zarr"), rel=0.05)
    for stage, (name, run) in enumerate(
        zip(("stage 1, FP32", "stage 2, FP8"), small_demo.runs("train"), strict=True), 1
    ):
        checkpoint = run / "checkpoints" / f"step-{STEPS:08d}"
        assert sizes(lines[name])[0] == pytest.approx(folder_bytes(checkpoint), rel=0.05)
        recipe = from_json((run / "config.json").read_text())
        assert estimates.num_checkpoints(recipe, stage) == (1, 1)
