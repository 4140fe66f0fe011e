"""Training that is stopped and killed again and again ends where one that was left alone does, bit for bit."""

import dataclasses
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from conversion.options import Options
from conversion.to_fp8 import convert
from jobs.state.journal import Journal, read_journal
from pixart.checkpoint import directory as checkpoints
from pixart.config.recipe import from_json, to_json
from pixart.training.loop import Stopped, train
from tests.support import ranks

STEPS, STOPS = 200, 10


def child(recipe_json: str, stage: int, run: str, start: str | None) -> None:
    """One rank, which ends as on a cluster: SIGTERM sets a flag."""
    asked = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    recipe = from_json(recipe_json)
    try:
        train(
            stage=stage,
            model=recipe.model,
            config=recipe.train(stage),
            dataset=recipe.data.path,
            run=run,
            start=start,
            reporter=Journal(run),
            stop=lambda: len(asked),
        )
    except Stopped:
        os._exit(3)


def history(run: Path) -> dict[int, float]:
    """The loss of each step; one that was told twice must have been the same twice."""
    losses: dict[int, float] = {}
    for line in read_journal(run)[0]:
        if "train/loss" in line.get("metrics", {}):
            assert losses.setdefault(line["step"], line["metrics"]["train/loss"]) == line["metrics"]["train/loss"]
    return losses


def disturbed(world: int, recipe_json: str, stage: int, run: Path, start: str | None) -> list[str]:
    """Trains to the end through many stops, each a few steps after the one before; returns what has ended it."""
    random.seed(0)
    ends = []
    at = 0
    while True:
        processes = ranks.start(world, child, recipe_json, stage, str(run), start)
        if len(ends) < STOPS:
            at += random.randint(8, STEPS // STOPS - 2)
            wait_for(run, at, processes)
            how = random.choice(["term", "kill one", "kill all"])
            ends.append(how)
            for process in processes[: 1 if how == "kill one" else None]:
                os.kill(process.pid, signal.SIGTERM if how == "term" else signal.SIGKILL)
            if how == "kill one":  # the others wait for it, as long as nobody ends them
                for process in processes[1:]:
                    process.kill()
        for process in processes:
            process.join(120)
        if all(process.exitcode == 0 for process in processes):
            return ends


def wait_for(run: Path, step: int, processes) -> None:
    deadline = time.monotonic() + 120
    while max(history(run), default=0) < step:
        assert time.monotonic() < deadline
        assert all(process.is_alive() for process in processes) or max(history(run)) == STEPS
        time.sleep(0.01)


@pytest.fixture(scope="module")
def recipe(small_recipe):
    def longer(config, **changes):
        return dataclasses.replace(
            config, steps=STEPS, save_every=7, validate_every=50, num_validation_samples=8, log_every=1, **changes
        )

    return dataclasses.replace(
        small_recipe, stage1=longer(small_recipe.stage1, precision="bf16"), stage2=longer(small_recipe.stage2)
    )


@pytest.fixture(scope="module")
def converted(recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    config = dataclasses.replace(recipe.stage1, steps=6)
    last = train(stage=1, model=recipe.model, config=config, dataset=recipe.data.path, run=folder)
    convert(last, folder / "c.fp8", Options(batches=2, batch=8))
    return str(folder / "c.fp8")


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("stage", [1, 2])
def test_ten_stops_change_nothing(recipe, converted, tmp_path, world, stage):
    """Stage 1 in BF16, stage 2 in FP8: weights, average, moments, scales and every loss."""
    start = converted if stage == 2 else None
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    for folder in (straight, stopped):
        folder.mkdir()
    ranks.run(world, child, to_json(recipe), stage, str(straight), start)
    ends = disturbed(world, to_json(recipe), stage, stopped, start)
    assert len(ends) == STOPS
    assert len(set(ends)) == 3
    one, other = (checkpoints.load(folder / f"checkpoints/step-{STEPS:08d}") for folder in (straight, stopped))
    for group, tensors in one.tensors().items():
        assert tensors.keys() == other.tensors()[group].keys()
        for name in tensors:
            assert torch.equal(tensors[name], other.tensors()[group][name]), f"{group}.{name}"
    assert bool(one.scales) == (stage == 2)
    assert one.plan == other.plan
    assert history(straight) == history(stopped)
    assert sorted(history(straight)) == list(range(1, STEPS + 1))
    told = [
        {
            line["step"]: line["metrics"]["val/loss_ema"]
            for line in read_journal(folder)[0]
            if "val/loss" in json.dumps(line)
        }
        for folder in (straight, stopped)
    ]
    assert told[0] == told[1]
    assert set(told[0]) == {50, 100, 150, 200}
