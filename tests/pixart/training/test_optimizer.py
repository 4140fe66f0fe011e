import math
import shutil

import pytest
import torch

from pixart.config.training import TrainConfig
from pixart.model.dit import DiT
from pixart.training.ema import Ema, decay_at
from pixart.training.fused_adamw_ema import OnePass
from pixart.training.optimizer import MOMENTS, learning_rate, make_optimizer, optimizer_tensors

CONFIG = TrainConfig(steps=100, global_batch_size=8, lr=1e-3, warmup_steps=10, min_lr_ratio=0.1)
SIZES = {"in_dim": 4, "dim": 16, "cond_dim": 8, "num_heads": 2, "num_blocks": 1, "base_image_size": 8, "num_classes": 3}


def test_learning_rate_by_hand():
    assert learning_rate(0, CONFIG) == pytest.approx(1e-4)
    assert learning_rate(9, CONFIG) == pytest.approx(1e-3)
    assert learning_rate(55, CONFIG) == pytest.approx(1e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2))
    assert learning_rate(100, CONFIG) == pytest.approx(1e-4)
    assert learning_rate(10_000, CONFIG) == pytest.approx(1e-4)
    constant = TrainConfig(steps=100, global_batch_size=8, lr=1e-3, warmup_steps=0)
    assert {learning_rate(step, constant) for step in range(100)} == {1e-3}


def test_one_step_against_the_formula():
    """AdamW (Loshchilov and Hutter, algorithm 2), decay on weights only."""
    torch.manual_seed(0)
    model = DiT(**SIZES)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = make_optimizer(model, CONFIG)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        exempt = name.endswith("bias") or "norm" in name or "cond_proj" in name
        decayed = before[name] * (1 - CONFIG.lr * (0 if exempt else CONFIG.weight_decay))
        expected = decayed - CONFIG.lr * parameter.grad / (parameter.grad.abs() + CONFIG.eps)
        assert torch.allclose(parameter, expected, atol=1e-6), name


def test_moments_have_the_names_of_their_parameters():
    torch.manual_seed(0)
    model = DiT(**SIZES)
    optimizer = make_optimizer(model, CONFIG)
    assert all((tensor == 0).all() for tensor in optimizer_tensors(optimizer, model).values())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        found = {key: optimizer_tensors(optimizer, model)[f"{name}.{key}"] for key in ("exp_avg", "exp_avg_sq", "step")}
        assert torch.allclose(found["exp_avg"], (1 - CONFIG.beta1) * parameter.grad)
        assert torch.allclose(found["exp_avg_sq"], (1 - CONFIG.beta2) * parameter.grad.square())
        assert found["step"] == 1


def test_average_follows_the_weights():
    model = DiT(**SIZES)
    ema = Ema(model, decay=0.9)
    weight = model.patchify.weight
    expected = weight.detach().clone()
    for step in range(200):
        with torch.no_grad():
            weight.add_(0.01)
        ema.update(model, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach()
    assert torch.allclose(ema.averages["patchify.weight"], expected, atol=1e-5)
    assert decay_at(0, 0.999) == 0.1
    assert decay_at(10**6, 0.999) == 0.999


def test_average_stands_in_for_the_weights_and_leaves_them_as_they_were():
    model = DiT(**SIZES)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ema = Ema(model, decay=0.9)
    for average in ema.averages.values():
        average.add_(1)
    with ema.in_place_of(model):
        assert all(torch.equal(parameter, ema.averages[name]) for name, parameter in model.named_parameters())
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ to compile for a CPU")
def test_one_pass_is_adamw_and_the_average_after_it():
    """Steps that are left out too, the first among them."""
    kinds = {}
    for kind in ("two", "one"):
        torch.manual_seed(0)
        model = DiT(**SIZES | {"num_blocks": 2})
        kinds[kind] = model, make_optimizer(model, CONFIG), Ema(model, decay=0.9)
    (model, optimizer, ema), (other, its_optimizer, its_ema) = kinds["two"], kinds["one"]
    for average in (ema.averages["patchify.bias"], its_ema.averages["patchify.bias"]):
        average.add_(1)
    one_pass = OnePass(other, its_optimizer, its_ema.averages)
    for step in range(6):
        skip = torch.tensor(step in (0, 3))
        for parameter, its in zip(model.parameters(), other.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter) / (0 if skip else 1)
            its.grad = parameter.grad.clone()
        for reached_by_none in (model.patchify.bias, other.patchify.bias):
            reached_by_none.grad = None
        optimizer.found_inf = skip.float()
        optimizer.step()
        ema.update(model, step)
        one_pass.step(CONFIG.lr, 1 - decay_at(step, 0.9), skip)
    expected, found = optimizer_tensors(optimizer, model), optimizer_tensors(its_optimizer, other)
    for name, parameter in model.named_parameters():
        assert found[f"{name}.step"] == expected[f"{name}.step"] == (0 if name == "patchify.bias" else 4)
        torch.testing.assert_close(other.get_parameter(name), parameter, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(its_ema.averages[name], ema.averages[name], rtol=1e-5, atol=1e-7)
        for moment in MOMENTS:
            torch.testing.assert_close(found[f"{name}.{moment}"], expected[f"{name}.{moment}"], rtol=1e-5, atol=1e-7)
