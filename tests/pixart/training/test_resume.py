"""A run that is stopped and killed repeatedly ends bit-identical to an uninterrupted one."""

import dataclasses
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch

from conversion.convert import convert
from conversion.options import Options
from jobs.state.journal import Journal, read_journal
from pixart.checkpoint import directory as checkpoints
from pixart.config.recipe import from_json, to_json
from pixart.training.loop import Stopped, train
from tests.support import ranks

STEPS, STOPS = 200, 10


def child(recipe_json: str, stage: int, run: str, start: str | None) -> None:
    """Train on one rank, where SIGTERM sets a flag as on a cluster."""
    signals = []
    signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
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
            stop=lambda: len(signals),
        )
    except Stopped:
        os._exit(3)


def logged_losses(run: Path) -> dict[int, float]:
    """Return the loss of each step, and assert that losses of a repeated step are equal."""
    losses: dict[int, float] = {}
    for line in read_journal(run)[0]:
        if "train/loss" in line.get("metrics", {}):
            assert losses.setdefault(line["step"], line["metrics"]["train/loss"]) == line["metrics"]["train/loss"]
    return losses


def train_with_interruptions(world_size: int, recipe_json: str, stage: int, run: Path, start: str | None) -> list[str]:
    """Train to the end with STOPS interruptions, each a few steps after the previous one, and return their kinds."""
    random.seed(0)
    interruptions = []
    step = 0
    while True:
        processes = ranks.start(world_size, child, recipe_json, stage, str(run), start)
        if len(interruptions) < STOPS:
            step += random.randint(8, STEPS // STOPS - 2)
            wait_for(run, step, processes)
            kind = random.choice(["term", "kill one", "kill all"])
            interruptions.append(kind)
            for process in processes[: 1 if kind == "kill one" else None]:
                os.kill(process.pid, signal.SIGTERM if kind == "term" else signal.SIGKILL)
            if kind == "kill one":  # the other ranks would wait for it forever
                for process in processes[1:]:
                    process.kill()
        for process in processes:
            process.join(120)
        if all(process.exitcode == 0 for process in processes):
            return interruptions


def wait_for(run: Path, step: int, processes) -> None:
    deadline = time.monotonic() + 120
    while max(logged_losses(run), default=0) < step:
        assert time.monotonic() < deadline
        assert all(process.is_alive() for process in processes) or max(logged_losses(run)) == STEPS
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
    convert(last, folder / "c.fp8", Options(num_batches=2, batch_size=8))
    return str(folder / "c.fp8")


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("stage", [1, 2])
def test_ten_interruptions_change_nothing(recipe, converted, tmp_path, world_size, stage):
    """Weights, EMA weights, moments, scales and losses are equal, for stage 1 in BF16 and stage 2 in FP8."""
    start = converted if stage == 2 else None
    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    for folder in (uninterrupted, interrupted):
        folder.mkdir()
    ranks.run(world_size, child, to_json(recipe), stage, str(uninterrupted), start)
    interruptions = train_with_interruptions(world_size, to_json(recipe), stage, interrupted, start)
    assert len(interruptions) == STOPS
    assert len(set(interruptions)) == 3
    expected, actual = (
        checkpoints.load(folder / f"checkpoints/step-{STEPS:08d}") for folder in (uninterrupted, interrupted)
    )
    for group, tensors in expected.tensors().items():
        assert tensors.keys() == actual.tensors()[group].keys()
        for name in tensors:
            assert torch.equal(tensors[name], actual.tensors()[group][name]), f"{group}.{name}"
    assert bool(expected.scales) == (stage == 2)
    assert expected.plan == actual.plan
    assert logged_losses(uninterrupted) == logged_losses(interrupted)
    assert sorted(logged_losses(uninterrupted)) == list(range(1, STEPS + 1))
    validation_losses = [
        {
            line["step"]: line["metrics"]["val/loss_ema"]
            for line in read_journal(folder)[0]
            if "val/loss" in json.dumps(line)
        }
        for folder in (uninterrupted, interrupted)
    ]
    assert validation_losses[0] == validation_losses[1]
    assert set(validation_losses[0]) == {50, 100, 150, 200}
