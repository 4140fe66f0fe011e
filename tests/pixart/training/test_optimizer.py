import math

import pytest
import torch

from pixart.config import TrainConfig
from pixart.model.dit import DiT
from pixart.training.ema import Ema, decay_at
from pixart.training.optimizer import learning_rate, load_optimizer_state, make_optimizer, optimizer_state

CONFIG = TrainConfig(steps=100, batch=8, lr=1e-3, warmup=10, final_lr=0.1)
SIZES = {"in_dim": 4, "dim": 16, "cond_dim": 8, "num_heads": 2, "num_blocks": 1, "base_image_size": 8, "num_classes": 3}


def test_learning_rate_by_hand():
    assert learning_rate(0, CONFIG) == pytest.approx(1e-4)
    assert learning_rate(9, CONFIG) == pytest.approx(1e-3)
    assert learning_rate(55, CONFIG) == pytest.approx(1e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2))
    assert learning_rate(100, CONFIG) == pytest.approx(1e-4)
    assert learning_rate(10_000, CONFIG) == pytest.approx(1e-4)
    constant = TrainConfig(steps=100, batch=8, lr=1e-3, warmup=0)
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


def test_state_by_name_goes_around():
    torch.manual_seed(0)
    model = DiT(**SIZES)
    optimizer = make_optimizer(model, CONFIG)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    state = optimizer_state(optimizer, model)
    other = make_optimizer(model, CONFIG)
    load_optimizer_state(other, model, state)
    for name, parameter in model.named_parameters():
        assert torch.equal(other.state[parameter]["exp_avg_sq"], optimizer.state[parameter]["exp_avg_sq"]), name
        assert other.state[parameter]["step"] == 1
    del state["patchify.bias.exp_avg"]
    with pytest.raises(ValueError, match=r"patchify\.bias"):
        load_optimizer_state(other, model, state)


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
