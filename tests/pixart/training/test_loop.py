"""Training on real stored latents: resume bit for bit, FP8, ranks, falling loss, refusals."""

import dataclasses

import pytest
import torch

from conversion.options import Options
from conversion.to_fp8 import convert
from pixart import checkpoint as checkpoints
from pixart.training.loop import train


def run_stage(recipe, run, stage, config, start=None, report=lambda step, metrics: None):
    return train(
        stage=stage, model=recipe.model, config=config, dataset=recipe.data.path, run=run, start=start, report=report
    )


def assert_equal(one: checkpoints.Checkpoint, other: checkpoints.Checkpoint) -> None:
    assert one.step == other.step
    for field in ("model", "ema", "optimizer", "scales"):
        first, second = getattr(one, field), getattr(other, field)
        assert first.keys() == second.keys()
        for key in first:
            assert torch.equal(first[key], second[key]), f"{field}: {key}"


@pytest.fixture(scope="module")
def stage1(small_recipe, tmp_path_factory):
    losses: dict[int, float] = {}
    last = run_stage(
        small_recipe,
        tmp_path_factory.mktemp("stage1"),
        1,
        small_recipe.stage1,
        report=lambda step, metrics: losses.update({step: metrics["train/loss"]}),
    )
    return last, losses


@pytest.fixture(scope="module")
def converted(stage1, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / "c.fp8"
    convert(stage1[0], output, Options(batches=2, batch=8))
    return output


def test_resume_is_exact(small_recipe, stage1, tmp_path):
    """Stopped after 3 of 6 steps and gone on: losses, weights, average and moments are those of one go."""
    whole, losses = stage1
    again: dict[int, float] = {}
    first = whole.parent / "step-00000003"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / first.name).symlink_to(first)
    last = run_stage(
        small_recipe, tmp_path, 1, small_recipe.stage1, report=lambda step, m: again.update({step: m["train/loss"]})
    )
    assert sorted(again) == [4, 5, 6]
    assert all(losses[step] == again[step] for step in again)
    assert_equal(checkpoints.load(last), checkpoints.load(whole))


def test_fp8_resume_is_exact_and_scales_move(small_recipe, converted, tmp_path):
    start = checkpoints.load(converted)
    whole = run_stage(small_recipe, tmp_path / "whole", 2, small_recipe.stage2, start=converted)
    (tmp_path / "again/checkpoints").mkdir(parents=True)
    (tmp_path / "again/checkpoints/step-00000003").symlink_to(whole.parent / "step-00000003")
    again = run_stage(small_recipe, tmp_path / "again", 2, small_recipe.stage2)
    one = checkpoints.load(whole)
    assert_equal(checkpoints.load(again), one)
    name = "dit_blocks.0.mlp.linear1.amax_history"
    assert one.scales[name].shape == start.scales[name].shape
    assert not torch.equal(one.scales[name], start.scales[name])
    assert all(torch.isfinite(scale).all() and (scale > 0).all() for key, scale in one.scales.items() if "scale" in key)
    # Gradients reach the text's projections once the zero projection behind them has moved.
    assert one.scales["dit_blocks.0.cross_attention.q_proj.amax_history"][-1, 2] > 0


def test_stage2_begins_where_stage1_ended(small_recipe, stage1, converted):
    first: list[float] = []
    config = dataclasses.replace(small_recipe.stage2, steps=1, lr=0.0, drop=0.0)
    run_stage(
        small_recipe,
        converted.parent / "run",
        2,
        config,
        start=converted,
        report=lambda step, metrics: first.append(metrics["train/loss"]),
    )
    last_of_stage1 = min(stage1[1].values())
    assert first[0] < 1.3 * last_of_stage1  # another batch; the end-to-end test compares the same ones


def test_bf16_trains_with_float32_masters(small_recipe, tmp_path):
    losses: list[float] = []
    config = dataclasses.replace(small_recipe.stage1, precision="bf16", steps=30, lr=3e-3)
    last = run_stage(
        small_recipe, tmp_path, 1, config, report=lambda step, metrics: losses.append(metrics["train/loss"])
    )
    state = checkpoints.load(last).model
    assert all(tensor.dtype == torch.float32 for tensor in state.values())
    assert not torch.equal(state["patchify.weight"], state["patchify.weight"].bfloat16().float())
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        (1, {"batch": 7, "fp8": True}, "conversion.to_fp8"),
        (2, {}, "conversion.to_fp8"),
    ],
)
def test_refusals(small_recipe, tmp_path, stage, changes, message):
    config = dataclasses.replace(small_recipe.train(stage), **changes)
    with pytest.raises(ValueError, match=message):
        run_stage(small_recipe, tmp_path, stage, config)
    assert not (tmp_path / "checkpoints").exists()


def test_stage_of_the_checkpoint_is_checked(small_recipe, stage1, tmp_path):
    config = dataclasses.replace(small_recipe.stage2, fp8=False)
    with pytest.raises(ValueError, match="stage 1, not 2"):
        run_stage(small_recipe, tmp_path, 2, config, start=stage1[0])
