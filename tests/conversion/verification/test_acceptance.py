"""The gate and what it is told: cosines, losses, carried bits."""

import dataclasses
import math

import pytest
import torch

from conversion.batches import synthetic_batches
from conversion.calibration import amax
from conversion.verification import acceptance, quantization_error
from pixart.checkpoint import directory as checkpoints
from pixart.model.dit import load_model
from pixart.model.fp8.plan import Plan
from pixart.model.fp8.scaling import calibrated_state

LINEARS = ("dit_blocks.0.mlp.linear1", "dit_blocks.1.attention.attention.q_proj")
LOSSES = {"stage 1, BF16": 0.8, "stage 2, BF16": 0.804, "stage 2, FP8": 0.805}


def test_cosine_of_gradients():
    exact = {"a": torch.tensor([[3.0, 0.0]]), "b": torch.tensor([[0.0, 4.0], [0.0, 0.0]])}
    assert acceptance.gradient_cosine(exact, exact) == pytest.approx(1, abs=1e-12)
    assert acceptance.gradient_cosine(exact, {"b": exact["b"]}) == pytest.approx(1, abs=1e-12)
    turned = {"a": torch.tensor([[0.0, 3.0]]), "b": exact["b"]}
    assert acceptance.gradient_cosine(exact, turned) == pytest.approx(16 / 25, abs=1e-12)
    nothing = {name: torch.zeros_like(gradient) for name, gradient in exact.items()}
    assert acceptance.gradient_cosine(exact, nothing) == 0
    assert acceptance.gradient_cosine(nothing, exact) is None
    assert acceptance.gradient_cosine(exact, {}) is None


@pytest.mark.parametrize(("rows", "together"), [(1, 1), (32, 2), (4096, 3)])
def test_batches_that_share_a_pass_keep_their_own_losses_and_rows(monkeypatch, stage1, rows, together):
    batches = synthetic_batches(stage1.config, 48, 3, 1)  # of 16 tokens
    model, copy = (load_model(stage1.config, stage1.model) for _ in range(2))
    plan = Plan(linears=LINEARS, history=4)
    scales = calibrated_state({name: torch.tensor([8.0, 0.5, 0.01]) for name in LINEARS}, plan)
    checkpoint = dataclasses.replace(stage1, plan=plan, scales=scales)
    monkeypatch.setattr("conversion.batches.ROWS", 1)
    alone = quantization_error.observe(model, checkpoint, batches)
    monkeypatch.setattr("conversion.batches.ROWS", rows)
    observed = quantization_error.observe(model, checkpoint, batches)
    found, gradients = acceptance.in_fp8(copy, batches, LINEARS)

    assert observed.loss == pytest.approx(alone.loss, rel=1e-5)
    assert found == pytest.approx(alone.loss, rel=1e-2)  # in BF16
    for layer, other in zip(observed.layers, alone.layers, strict=True):
        assert layer["name"] == other["name"]
        assert layer["amax"] == pytest.approx(other["amax"], rel=1e-4)
        assert layer["sqnr"] == pytest.approx(other["sqnr"], abs=0.05)
        assert layer["dynamic"] == pytest.approx(other["dynamic"], abs=0.05)
    weights = [model.get_submodule(name).weight.requires_grad_() for name in LINEARS]
    loss = sum(amax.batch_losses(model, {seed: batches[seed]}).sum() for seed in range(together))
    exact = dict(zip(LINEARS, torch.autograd.grad(loss, weights), strict=True))
    assert acceptance.gradient_cosine(exact, observed.gradients) > 0.9999
    for name, gradient in exact.items():
        assert float(observed.gradients[name].norm()) == pytest.approx(float(gradient.norm()), rel=1e-2)
    assert acceptance.gradient_cosine(observed.gradients, gradients) > 0.999


@pytest.mark.parametrize("recipe", ["delayed", "rowwise"])
def test_quantized_model_is_where_its_weights_are(stage1, recipe):
    plan = Plan(linears=LINEARS, recipe=recipe, history=4)
    model = load_model(stage1.config, stage1.model, "meta")
    scales = calibrated_state({name: torch.ones(3) for name in LINEARS}, plan)
    assert acceptance.quantized(model, plan, scales).adaLN1.weight.device.type == "meta"


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
        ([], {"stage 1, BF16": 0.82}, ["to stage 2"]),
    ],
)
def test_gate(layers, changed, failing):
    found = [check.name for check in acceptance.gate(layers, {**LOSSES, **changed}) if not check.passed]
    assert len(found) == len(failing)
    assert all(name.endswith(end) for name, end in zip(found, failing, strict=True))


def test_one_other_bit_is_found(stage1, tmp_path):
    fates = dict.fromkeys(stage1.model, "carried")
    checkpoints.write_state(stage1, tmp_path)
    assert acceptance.carried_check(stage1, tmp_path, fates).passed
    name = "dit_blocks.1.mlp.linear2.bias"
    for field, key in (("model", name), ("ema", name), ("optimizer", f"{name}.exp_avg_sq")):
        tensor = getattr(stage1, field)[key].clone()
        tensor.view(torch.int32)[3] ^= 1
        altered = dataclasses.replace(stage1, **{field: {**getattr(stage1, field), key: tensor}})
        check = acceptance.carried_check(altered, tmp_path, fates)
        assert not check.passed
        assert key in check.value
        assert acceptance.carried_check(altered, tmp_path, {**fates, name: "derived"}).passed
