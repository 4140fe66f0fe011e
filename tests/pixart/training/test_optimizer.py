import dataclasses
import math
import shutil

import pytest
import torch

from pixart.config.training import TrainConfig
from pixart.model.dit import DiT
from pixart.training.ema import EMA, ema_decay
from pixart.training.fused_adamw_ema import FusedAdamWEma
from pixart.training.optimizer import MOMENTS, learning_rate, make_optimizer, optimizer_tensors

CONFIG = TrainConfig(steps=100, global_batch_size=8, lr=1e-3, warmup_steps=10, min_lr_ratio=0.1)
SIZES = {"in_dim": 4, "dim": 16, "cond_dim": 8, "num_heads": 2, "num_blocks": 1, "base_image_size": 8, "num_classes": 3}


def test_learning_rate_schedule():
    assert learning_rate(0, CONFIG) == pytest.approx(1e-4)
    assert learning_rate(9, CONFIG) == pytest.approx(1e-3)
    assert learning_rate(55, CONFIG) == pytest.approx(1e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2))
    assert learning_rate(100, CONFIG) == pytest.approx(1e-4)
    assert learning_rate(10_000, CONFIG) == pytest.approx(1e-4)
    constant = TrainConfig(steps=100, global_batch_size=8, lr=1e-3, warmup_steps=0)
    assert {learning_rate(step, constant) for step in range(100)} == {1e-3}


@pytest.mark.parametrize("decay_qk_norm", [False, True])
def test_one_step_against_the_formula(decay_qk_norm):
    """AdamW (Loshchilov and Hutter, algorithm 2), decay on weights only, and on request on the norms' weights."""
    config = dataclasses.replace(CONFIG, decay_qk_norm=decay_qk_norm, weight_decay=0.5)
    torch.manual_seed(0)
    model = DiT(**SIZES)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, config)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        exempt = name.endswith("bias") or ("norm" in name and not decay_qk_norm) or "cond_proj" in name
        decayed = before[name] * (1 - CONFIG.lr * (0 if exempt else config.weight_decay))
        expected = decayed - CONFIG.lr * parameter.grad / (parameter.grad.abs() + CONFIG.eps)
        assert torch.allclose(parameter, expected, atol=1e-6), name


def test_optimizer_tensors_are_named_by_parameter():
    torch.manual_seed(0)
    model = DiT(**SIZES)
    optimizer = make_optimizer(model, CONFIG)
    assert all((tensor == 0).all() for tensor in optimizer_tensors(optimizer, model).values())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        state = {key: optimizer_tensors(optimizer, model)[f"{name}.{key}"] for key in ("exp_avg", "exp_avg_sq", "step")}
        assert torch.allclose(state["exp_avg"], (1 - CONFIG.beta1) * parameter.grad)
        assert torch.allclose(state["exp_avg_sq"], (1 - CONFIG.beta2) * parameter.grad.square())
        assert state["step"] == 1


def test_ema_update():
    model = DiT(**SIZES)
    ema = EMA(model, decay=0.9)
    weight = model.patchify.weight
    expected = weight.detach().clone()
    for step in range(200):
        with torch.no_grad():
            weight.add_(0.01)
        ema.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach()
    assert torch.allclose(ema.weights["patchify.weight"], expected, atol=1e-5)
    assert ema_decay(0, 0.999) == 0.1
    assert ema_decay(10**6, 0.999) == 0.999


def test_ema_is_applied_and_the_weights_are_restored():
    model = DiT(**SIZES)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ema = EMA(model, decay=0.9)
    for weight in ema.weights.values():
        weight.add_(1)
    with ema.applied_to(model):
        assert all(torch.equal(parameter, ema.weights[name]) for name, parameter in model.named_parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ to compile for a CPU")
def test_fused_update_equals_adamw_followed_by_ema():
    """Including skipped steps, among them the first, and a parameter without a gradient."""
    setups = []
    for _ in range(2):
        torch.manual_seed(0)
        model = DiT(**SIZES | {"num_blocks": 2})
        setups.append((model, make_optimizer(model, CONFIG), EMA(model, decay=0.9)))
    (model, optimizer, ema), (fused_model, fused_optimizer, fused_ema) = setups
    for weight in (ema.weights["patchify.bias"], fused_ema.weights["patchify.bias"]):
        weight.add_(1)
    fused_update = FusedAdamWEma(fused_model, fused_optimizer, fused_ema.weights)
    for step in range(6):
        skip = torch.tensor(step in (0, 3))
        for parameter, fused_parameter in zip(model.parameters(), fused_model.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter) / (0 if skip else 1)
            fused_parameter.grad = parameter.grad.clone()
        for bias in (model.patchify.bias, fused_model.patchify.bias):
            bias.grad = None
        optimizer.found_inf = skip.float()
        optimizer.step()
        ema.update(model, step)
        fused_update.step(CONFIG.lr, 1 - ema_decay(step, 0.9), skip)
    expected, actual = optimizer_tensors(optimizer, model), optimizer_tensors(fused_optimizer, fused_model)
    for name, parameter in model.named_parameters():
        assert actual[f"{name}.step"] == expected[f"{name}.step"] == (0 if name == "patchify.bias" else 4)
        torch.testing.assert_close(fused_model.get_parameter(name), parameter, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(fused_ema.weights[name], ema.weights[name], rtol=1e-5, atol=1e-7)
        for moment in MOMENTS:
            torch.testing.assert_close(actual[f"{name}.{moment}"], expected[f"{name}.{moment}"], rtol=1e-5, atol=1e-7)
