"""Acceptance checks and their inputs: cosine similarity, losses, carried tensors."""

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


def test_gradient_cosine():
    exact = {"a": torch.tensor([[3.0, 0.0]]), "b": torch.tensor([[0.0, 4.0], [0.0, 0.0]])}
    assert acceptance.gradient_cosine(exact, exact) == pytest.approx(1, abs=1e-12)
    assert acceptance.gradient_cosine(exact, {"b": exact["b"]}) == pytest.approx(1, abs=1e-12)
    rotated = {"a": torch.tensor([[0.0, 3.0]]), "b": exact["b"]}
    assert acceptance.gradient_cosine(exact, rotated) == pytest.approx(16 / 25, abs=1e-12)
    zero = {name: torch.zeros_like(gradient) for name, gradient in exact.items()}
    assert acceptance.gradient_cosine(exact, zero) == 0
    assert acceptance.gradient_cosine(zero, exact) is None
    assert acceptance.gradient_cosine(exact, {}) is None


@pytest.mark.parametrize(("tokens_per_pass", "batches_in_pass"), [(1, 1), (32, 2), (4096, 3)])
def test_results_do_not_depend_on_the_batches_per_pass(monkeypatch, stage1, tokens_per_pass, batches_in_pass):
    batches = synthetic_batches(stage1.config, 48, 3, 1)  # 16 tokens each
    model, copy = (load_model(stage1.config, stage1.model) for _ in range(2))
    plan = Plan(linears=LINEARS, history=4)
    scales = calibrated_state({name: torch.tensor([8.0, 0.5, 0.01]) for name in LINEARS}, plan)
    checkpoint = dataclasses.replace(stage1, plan=plan, scales=scales)
    monkeypatch.setattr("conversion.batches.TOKENS_PER_PASS", 1)
    expected = quantization_error.observe(model, checkpoint, batches)
    monkeypatch.setattr("conversion.batches.TOKENS_PER_PASS", tokens_per_pass)
    actual = quantization_error.observe(model, checkpoint, batches)
    fp8_loss, grads = acceptance.fp8_loss_and_grads(copy, batches, LINEARS)

    assert actual.loss == pytest.approx(expected.loss, rel=1e-5)
    assert fp8_loss == pytest.approx(expected.loss, rel=1e-2)
    for layer, expected_layer in zip(actual.layers, expected.layers, strict=True):
        assert layer["name"] == expected_layer["name"]
        assert layer["amax"] == pytest.approx(expected_layer["amax"], rel=1e-4)
        for key in ("sqnr_db", "dynamic_sqnr_db"):
            assert layer[key] == pytest.approx(expected_layer[key], abs=0.05)
    weights = [model.get_submodule(name).weight.requires_grad_() for name in LINEARS]
    loss = sum(amax.batch_losses(model, {seed: batches[seed]}).sum() for seed in range(batches_in_pass))
    exact = dict(zip(LINEARS, torch.autograd.grad(loss, weights), strict=True))
    assert acceptance.gradient_cosine(exact, actual.grads) > 0.9999
    for name, grad in exact.items():
        assert float(actual.grads[name].norm()) == pytest.approx(float(grad.norm()), rel=1e-2)
    assert acceptance.gradient_cosine(actual.grads, grads) > 0.999


@pytest.mark.parametrize("recipe", ["delayed", "rowwise"])
def test_quantized_copy_is_on_the_device_of_its_weights(stage1, recipe):
    plan = Plan(linears=LINEARS, recipe=recipe, history=4)
    model = load_model(stage1.config, stage1.model, "meta")
    scales = calibrated_state({name: torch.ones(3) for name in LINEARS}, plan)
    assert acceptance.quantized_copy(model, plan, scales).adaLN1.weight.device.type == "meta"


def layer(sqnr_loss_db: float) -> dict[str, dict[str, float]]:
    return {"aligned_dynamic_sqnr_db": {"grad_weight": 30.0}, "sqnr_db": {"grad_weight": 30.0 - sqnr_loss_db}}


@pytest.mark.parametrize(
    ("layers", "changed_losses", "failing"),
    [
        ([layer(0.05)] * 8, {}, []),
        ([layer(0.15)] * 8, {}, ["mean"]),
        ([layer(0.0)] * 8 + [layer(0.6)], {}, ["worst layer"]),
        ([], {"stage 2, FP8": 0.8061}, ["FP8 loss"]),
        ([], {"stage 2, FP8": math.nan}, ["FP8 loss"]),
        ([], {"stage 1, BF16": 0.82}, ["stage-2 loss"]),
    ],
)
def test_acceptance_checks(layers, changed_losses, failing):
    checks = acceptance.check_losses_and_grads(layers, {**LOSSES, **changed_losses})
    actual = [check.name for check in checks if not check.passed]
    assert len(actual) == len(failing)
    assert all(name.endswith(end) for name, end in zip(actual, failing, strict=True))


def test_a_flipped_bit_is_detected(stage1, tmp_path):
    provenance = dict.fromkeys(stage1.model, "carried")
    checkpoints.write_state(stage1, tmp_path)
    assert acceptance.check_carried_tensors(stage1, tmp_path, provenance).passed
    name = "dit_blocks.1.mlp.linear2.bias"
    for field, key in (("model", name), ("ema", name), ("optimizer", f"{name}.exp_avg_sq")):
        tensor = getattr(stage1, field)[key].clone()
        tensor.view(torch.int32)[3] ^= 1
        altered = dataclasses.replace(stage1, **{field: {**getattr(stage1, field), key: tensor}})
        check = acceptance.check_carried_tensors(altered, tmp_path, provenance)
        assert not check.passed
        assert key in check.value
        assert acceptance.check_carried_tensors(altered, tmp_path, {**provenance, name: "derived"}).passed
