"""The gate and what it is told: cosines, losses, carried bits."""

import dataclasses
import math

import pytest
import torch

from conversion import verify
from conversion.calibrate import synthetic_batches
from pixart.model.dit import load_model
from pixart.model.fp8 import Plan, calibrated_state

LINEARS = ("dit_blocks.0.mlp.linear1", "dit_blocks.1.attention.attention.q_proj")
LOSSES = {"stage 1, as given": 0.8, "stage 2": 0.804, "stage 2, BF16": 0.804, "stage 2, FP8": 0.805}


def test_cosine_of_gradients(stage1):
    model, other = (load_model(stage1.config, stage1.model) for _ in range(2))
    batch = synthetic_batches(stage1.config, 48, 1, 4)[0]
    assert verify.gradient_cosine(model, other, LINEARS, batch) == pytest.approx(1, abs=1e-12)
    changed = {**stage1.model, "linear_out.weight": -stage1.model["linear_out.weight"]}
    assert abs(verify.gradient_cosine(model, load_model(stage1.config, changed), LINEARS, batch)) < 1
    silent = {**stage1.model, "linear_out.weight": torch.zeros_like(stage1.model["linear_out.weight"])}
    nothing = load_model(stage1.config, silent)
    assert verify.gradient_cosine(model, nothing, LINEARS, batch) == 0
    assert verify.gradient_cosine(nothing, model, LINEARS, batch) is None
    assert verify.gradient_cosine(model, other, (), batch) is None


@pytest.mark.parametrize("recipe", ["delayed", "rowwise"])
def test_quantized_model_is_where_its_weights_are(stage1, recipe):
    plan = Plan(linears=LINEARS, recipe=recipe, history=4)
    model = load_model(stage1.config, stage1.model, "meta")
    scales = calibrated_state({name: torch.ones(3) for name in LINEARS}, plan)
    assert verify.quantized(model, plan, scales).adaLN1.weight.device.type == "meta"


def layer(gap: float) -> dict[str, dict[str, float]]:
    return {"aligned": {"weight_gradient": 30.0}, "sqnr": {"weight_gradient": 30.0 - gap}}


@pytest.mark.parametrize(
    ("layers", "changed", "failing"),
    [
        ([layer(0.05)] * 8, {}, []),
        ([layer(0.15)] * 8, {}, ["mean"]),
        ([layer(0.0)] * 8 + [layer(0.6)], {}, ["worst layer"]),
        ([], {"stage 2, FP8": 0.8061}, ["BF16 to FP8"]),
        ([], {"stage 2, FP8": math.nan}, ["BF16 to FP8"]),
        ([], {"stage 2": 0.79}, ["to stage 2"]),
    ],
)
def test_gate(layers, changed, failing):
    found = [check.name for check in verify.gate(layers, {**LOSSES, **changed}) if not check.passed]
    assert len(found) == len(failing)
    assert all(name.endswith(end) for name, end in zip(found, failing, strict=True))


def test_one_other_bit_is_found(stage1):
    fates = dict.fromkeys(stage1.model, "carried")
    assert verify.carried_check(stage1, stage1, fates).passed
    name = "dit_blocks.1.mlp.linear2.bias"
    for field, key in (("model", name), ("ema", name), ("optimizer", f"{name}.exp_avg_sq")):
        tensor = getattr(stage1, field)[key].clone()
        tensor.view(torch.int32)[3] ^= 1
        altered = dataclasses.replace(stage1, **{field: {**getattr(stage1, field), key: tensor}})
        check = verify.carried_check(stage1, altered, fates)
        assert not check.passed
        assert key in check.value
