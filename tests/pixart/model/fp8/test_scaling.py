"""Scales that the linears of one GEMM share, in training and in the state of a checkpoint."""

import torch

from pixart.model.fp8 import linear as fp8
from pixart.model.fp8 import scaling
from pixart.model.fp8.ops import GRAD_OUTPUT, INPUT, WEIGHT
from pixart.model.fp8.plan import fused_linears
from tests.support.fp8_models import fp8_model, inputs, plan_of

ATTENTION = "dit_blocks.0.attention.attention"
FUSED = [f"{ATTENTION}.{name}_proj" for name in "qkv"]


def scales_of(model, names=FUSED) -> torch.Tensor:
    return torch.stack([model.get_submodule(name).scale for name in names])


def train_step(model) -> None:
    x, t, text, mask = inputs()
    model(x, t, text=text, text_mask=mask).square().mean().backward()
    scaling.update_scales(model, plan_of(model))


def test_groups_are_the_linears_of_one_input():
    cross = "dit_blocks.0.cross_attention"
    names = [*FUSED, *(f"{cross}.{name}_proj" for name in "qkv"), f"{ATTENTION}.out_proj", "dit_blocks.0.mlp.linear1"]
    assert fused_linears(names) == [FUSED, [f"{cross}.k_proj", f"{cross}.v_proj"]]
    assert fused_linears(FUSED[:2]) == []  # values have fallen back to BF16


def test_linears_of_one_gemm_share_the_scale_of_the_largest_amax():
    model = fp8_model(1)
    model.fuse_projections()
    with torch.no_grad():
        model.get_submodule(FUSED[1]).weight.mul_(3)
    train_step(model)
    scales = scales_of(model)
    assert torch.equal(scales, scales[:1].expand(3, -1))
    histories = torch.stack([model.get_submodule(name).amax_history[-1] for name in FUSED])
    assert scales[0, WEIGHT] == 448 / histories[1, WEIGHT]
    assert scales[0, GRAD_OUTPUT] == 57344 / histories[:, GRAD_OUTPUT].max()
    assert len(histories[:, WEIGHT].unique()) == 3  # each keeps its own history
    assert model.get_submodule(f"{ATTENTION}.out_proj").scale[INPUT] != scales[0, INPUT]


def test_scales_of_older_checkpoints_are_shared_when_they_are_loaded():
    model = fp8_model(1)
    train_step(model)
    state = scaling.scale_state(model)
    older = {**state, f"{FUSED[0]}.scale": 2 * state[f"{FUSED[0]}.scale"]}
    scaling.load_scale_state(model, older)
    for key, value in scaling.scale_state(model).items():
        assert torch.equal(value, state[key]), key  # and a state of this version does not change


def test_calibrated_scales_are_shared():
    model = fp8_model(1)
    plan = plan_of(model)
    amax = {name: torch.full((3,), 2.0 + index) for index, name in enumerate(plan.linears)}
    state = scaling.calibrated_state(amax, plan)
    largest = max(float(amax[name][WEIGHT]) for name in FUSED)
    assert {float(state[f"{name}.scale"][WEIGHT]) for name in FUSED} == {448 / largest}
    assert {float(state[f"{name}.amax_history"][1, WEIGHT]) for name in FUSED} == {2.0, 3.0, 4.0}
    before = {name: state[f"{name}.scale"].clone() for name in plan.linears}
    scaling.load_scale_state(model, state)
    assert all(torch.equal(linear.scale, before[name]) for name, linear in fp8.float8_linears(model))
