"""FP8: every code of both formats, products against a naive reference, scales, histories, state."""

import bisect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pixart.model.fp8 import linear as fp8
from pixart.model.fp8 import ops, scaling
from pixart.model.fp8.ops import CACHED, E4M3, E5M2, FORMATS, GRAD_OUTPUT, INPUT, SLOTS, WEIGHT
from pixart.model.fp8.plan import Plan, check_rows
from tests.support.fp8_models import sqnr


def all_codes(fmt: ops.Format) -> torch.Tensor:
    values = torch.arange(256, dtype=torch.uint8).view(fmt.dtype).float()
    return values[values.isfinite()]


def naive(x: torch.Tensor, scale: torch.Tensor, fmt: ops.Format) -> torch.Tensor:
    """Quantized and scaled back, by a real cast."""
    return (x * scale).clamp(-fmt.max, fmt.max).to(fmt.dtype).float() / scale


@pytest.mark.parametrize("fmt", FORMATS[1:], ids=["E4M3", "E5M2"])
def test_every_code_is_its_own_rounding(fmt):
    codes = all_codes(fmt)
    assert len(codes) in (254, 248)
    assert codes.max() == fmt.max
    assert torch.equal(ops.round_to_format_(codes.clone(), fmt), codes)


@pytest.mark.parametrize("fmt", FORMATS[1:], ids=["E4M3", "E5M2"])
def test_rounding_is_the_cast(fmt):
    """Every midpoint and its neighbours, subnormals among them, and every bfloat16 in range."""
    codes = all_codes(fmt).unique().double()
    midpoints = ((codes[1:] + codes[:-1]) / 2).float()
    infinity = torch.full_like(midpoints, torch.inf)
    bfloat = torch.arange(65536).to(torch.int32).to(torch.int16).view(torch.bfloat16).float()
    values = torch.cat([midpoints, midpoints.nextafter(infinity), midpoints.nextafter(-infinity), bfloat])
    values = values[values.isfinite() & (values.abs() <= fmt.max)]
    assert len(values) > 30_000
    assert torch.equal(ops.round_to_format_(values.clone(), fmt), values.to(fmt.dtype).float())


def test_quantize_saturates():
    big = torch.tensor([1e6, -1e6, 1.0])
    assert ops.quantize(big, torch.tensor(1.0), E4M3).tolist() == [448, -448, 1]
    assert ops.quantize(big, torch.tensor(1.0), E5M2).tolist() == [57344, -57344, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantize_in_pieces(dtype):
    """What is larger than a piece, and in another order than its memory's, has the values of a cast of the whole."""
    x = torch.randn(300, 257).to(dtype).t()
    assert x.numel() > 2 * CACHED
    wanted = (x.float() * 3).clamp(-448, 448).to(E4M3.dtype).float()
    assert torch.equal(ops.quantize(x, torch.tensor(3.0), E4M3), wanted)
    assert torch.equal(ops.quantize(x, torch.full((300,), 3.0), E4M3), wanted)


@pytest.mark.parametrize("amax", [0.0, float("inf"), float("nan"), 1e-45])
def test_unusable_amax_keeps_the_scale(amax):
    assert scaling.scale_from_amax(torch.tensor(amax), torch.tensor(3.0), 448.0) == 3


def test_scale_brings_amax_to_the_maximum():
    scale = scaling.scale_from_amax(torch.tensor(0.5), torch.tensor(1.0), E4M3.max)
    assert scale == 896
    assert scaling.scale_from_amax(torch.tensor(0.5), torch.tensor(1.0), E4M3.max, margin=2) == 224


def small_network(plan: Plan) -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 16))
    fp8.swap_linears(network, plan)
    return network


PLAN = Plan(linears=("0", "2"), history=4)


def test_swap_shares_parameters_and_keeps_keys():
    network = nn.Sequential(nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 16))
    weight, keys = network[0].weight, list(network.state_dict())
    fp8.swap_linears(network, PLAN)
    assert network[0].weight is weight
    assert list(network.state_dict()) == keys
    assert [name for name, _ in fp8.float8_linears(network)] == ["0", "2"]


@pytest.mark.parametrize("name", ["1", "7", "0.weight"])
def test_swap_refuses_what_is_no_linear(name):
    with pytest.raises(ValueError, match=name):
        fp8.swap_linears(nn.Sequential(nn.Linear(2, 2), nn.SiLU()), Plan(linears=(name,)))


def test_the_three_products_against_real_casts():
    network = small_network(PLAN)
    linear = network[0]
    x = torch.randn(64, 32, requires_grad=True)
    grad = torch.randn(64, 48) * 1e-6
    amax = torch.stack([x.detach().abs().max(), linear.weight.detach().abs().max(), grad.abs().max()])
    scaling.load_scale_state(network, scaling.calibrated_state({"0": amax, "2": torch.ones(3)}, PLAN))
    linear(x).backward(grad)

    x8, weight8 = (
        naive(x.detach(), linear.scale[INPUT], E4M3),
        naive(linear.weight.detach(), linear.scale[WEIGHT], E4M3),
    )
    grad8 = naive(grad, linear.scale[GRAD_OUTPUT], E5M2)
    assert torch.allclose(linear(x), F.linear(x8, weight8, linear.bias), atol=1e-5)
    assert torch.allclose(x.grad, grad8 @ weight8, rtol=1e-4, atol=1e-12)
    assert torch.allclose(linear.weight.grad, grad8.t() @ x8, rtol=1e-4, atol=1e-11)
    assert torch.equal(linear.bias.grad, grad.sum(0))  # the bias is no product
    assert sqnr(F.linear(x, linear.weight, linear.bias), linear(x)) > 25
    assert sqnr(grad.t() @ x.detach(), linear.weight.grad) > 20


def test_gradients_underflow_without_their_scale():
    """What calibration of grad_output is for: 1e-6 is below E5M2's smallest subnormal, 1.5e-5."""
    network = small_network(PLAN)
    network[0](torch.randn(64, 32)).backward(torch.randn(64, 48) * 1e-6)
    assert network[0].weight.grad.abs().max() == 0


def test_bfloat16_stays_bfloat16():
    network = small_network(PLAN).bfloat16()
    x = torch.randn(4, 32, dtype=torch.bfloat16, requires_grad=True)
    out = network[0](x)
    out.sum().backward()
    assert (out.dtype, x.grad.dtype, network[0].weight.grad.dtype) == (torch.bfloat16,) * 3


def test_amax_is_recorded_in_training_only_and_history_moves():
    network = small_network(PLAN)
    x = torch.randn(8, 32)
    with torch.no_grad():
        network(x)
    assert network[0].amax_history.abs().max() == 0
    for step in range(1, 6):
        network(x * step).sum().backward()
        assert network[0].amax_history[0, INPUT] == (x * step).abs().max()
        scaling.update_scales(network, PLAN)
        assert network[0].amax_history[-1, INPUT] == (x * step).abs().max()  # newest last
        assert network[0].amax_history[0].abs().max() == 0
    kept = [(x * step).abs().max() for step in (3, 4, 5)]
    assert torch.equal(network[0].amax_history[1:, INPUT], torch.stack(kept))
    assert network[0].scale[INPUT] == 448 / kept[-1]
    scaling.update_scales(network, PLAN)
    scaling.update_scales(network, PLAN)
    scaling.update_scales(network, PLAN)
    assert network[0].scale[INPUT] == 448 / kept[-1]  # nothing was seen: the scale stays


def test_scales_of_a_step_do_not_change_before_its_backward_pass():
    torch.manual_seed(1)
    x, grad = torch.randn(8, 32), torch.randn(8, 48)
    results = []
    for update_between in (False, True):
        network = small_network(PLAN)
        scaling.load_scale_state(
            network, scaling.calibrated_state({"0": torch.full((3,), 4.0), "2": torch.ones(3)}, PLAN)
        )
        out = network[0](x)
        if update_between:
            network[0].scale *= 7
        out.backward(grad)
        results.append(network[0].weight.grad)
    assert torch.equal(*results)


def test_gradients_that_nobody_asks_for_are_not_made():
    network = small_network(PLAN)
    network.requires_grad_(False)
    x = torch.randn(8, 32, requires_grad=True)
    network(x).sum().backward()
    assert x.grad is not None
    assert network[0].weight.grad is None
    assert network[0].amax_history[0, GRAD_OUTPUT] > 0


def test_state_round_trip_and_refusal():
    network = small_network(PLAN)
    scaling.load_scale_state(
        network, scaling.calibrated_state({"0": torch.tensor([1.0, 2.0, 0.0]), "2": torch.ones(3)}, PLAN)
    )
    state = scaling.scale_state(network)
    assert set(state) == {
        f"{name}.{kind}" for name in ("0", "2") for kind in ("scale", "amax_history", "overflow_share")
    }
    assert state["0.scale"].tolist() == [448, 224, 1]  # nothing was measured in the last slot
    assert state["0.amax_history"].shape == (4, len(SLOTS))
    again = small_network(PLAN)
    scaling.load_scale_state(again, state)
    for key, value in scaling.scale_state(again).items():
        assert torch.equal(value, state[key])
    with pytest.raises(ValueError, match="missing"):
        scaling.load_scale_state(again, {"0.scale": state["0.scale"]})
    with pytest.raises(ValueError, match="shape"):
        scaling.load_scale_state(again, {**state, "0.scale": torch.ones(2)})


def test_gradient_scales_follow_the_batch():
    network = small_network(PLAN)
    scaling.load_scale_state(
        network,
        scaling.calibrated_state({"0": torch.tensor([1.0, 1.0, 2.0]), "2": torch.tensor([1.0, 1.0, 0.0])}, PLAN),
    )
    scaling.rescale_gradients(network, 4.0)
    assert network[0].scale.tolist() == [448, 448, 57344 / 8]
    assert network[0].amax_history[1:, GRAD_OUTPUT].tolist() == [8.0] * 3
    assert network[2].scale[GRAD_OUTPUT] == 1


class Reference:
    """Delayed scaling of one tensor in plain Python, after its definition: nothing of it is shared with the product."""

    def __init__(self, fmt: ops.Format, history: int, margin: int) -> None:
        self.values = sorted(set(all_codes(fmt).tolist()))
        self.even = [index % 2 == 0 for index in self.codes_of_positives(fmt)]
        self.max, self.margin, self.length = fmt.max, margin, history
        self.scale, self.seen = np.float32(1), []

    @staticmethod
    def codes_of_positives(fmt: ops.Format) -> range:
        return range(int(torch.tensor(fmt.max).to(fmt.dtype).view(torch.uint8)) + 1)

    def rounded(self, value: float) -> float:
        """To the nearest of all values of the format; of two as near, to the one whose code is even."""
        value = max(-self.max, min(self.max, value))
        at = bisect.bisect_left(self.values, value)
        if self.values[at] == value:
            return value
        low, high = self.values[at - 1], self.values[at]
        if value - low != high - value:
            return low if value - low < high - value else high
        positives = [each for each in self.values if each >= 0]
        return low if self.even[positives.index(abs(low))] else high

    def step(self, tensor: torch.Tensor) -> tuple[float, float, list[float]]:
        """-> amax, the scale that was used, the quantized values."""
        flat = tensor.flatten().tolist()
        used, amax = self.scale, max(map(abs, flat))
        quantized = [self.rounded(float(np.float32(value) * used)) for value in flat]
        self.seen = [*self.seen, amax][-self.length :]
        if max(self.seen) > 0:
            self.scale = np.float32(self.max) / np.float32(max(self.seen)) / np.float32(2.0**self.margin)
        return amax, float(used), quantized


def test_fifty_steps_against_delayed_scaling_in_plain_python(monkeypatch):
    """Amax, scale and quantized values of each tensor of each linear, bit for bit."""
    plan = Plan(linears=("0", "2"), history=5, margin=1)
    network = small_network(plan)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    real, calls = ops.quantize, []

    def quantize(x, scale, fmt):
        calls.append((x.detach().clone(), float(scale), real(x, scale, fmt)))
        return calls[-1][2].clone()

    monkeypatch.setattr(ops, "quantize", quantize)
    order = [("0", INPUT), ("0", WEIGHT), ("2", INPUT), ("2", WEIGHT), ("2", GRAD_OUTPUT), ("0", GRAD_OUTPUT)]
    references = {key: Reference(FORMATS[key[1]], plan.history, plan.margin) for key in order}
    compared = 0
    for step in range(50):
        calls.clear()
        x = torch.randn(3, 32) * (1 + step % 7)
        (network(x) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        scaling.update_scales(network, plan)
        assert len(calls) == len(order)
        for (name, slot), (tensor, scale, quantized) in zip(order, calls, strict=True):
            amax, used, wanted = references[name, slot].step(tensor)
            linear = network.get_submodule(name)
            assert scale == used
            assert float(linear.amax_history[-1, slot]) == amax
            assert float(linear.scale[slot]) == references[name, slot].scale
            assert quantized.flatten().tolist() == wanted
            compared += len(wanted)
    assert compared > 100_000


def test_a_linear_that_keeps_overflowing_goes_on_without():
    """Its input grows faster than a scale from the past allows; the other's does not."""
    plan, network = PLAN, small_network(PLAN)
    for step in range(40):
        network[0](torch.full((4, 32), 2.0**step))
        network[2](torch.ones(4, 48))
        scaling.update_scales(network, plan)
    told = scaling.health(network)
    assert told["overflow_share"]["0.input"] > 0.5
    assert told["overflow_share"]["2.input"] < 0.1
    assert told["headroom"]["2.input"] == 0  # the last amax is just what the scale was made for
    assert told["scale"]["2.input"] == 448
    left = scaling.fall_back(network, plan, step=40)
    assert left.linears == ("2",)
    assert "overflowed in 7" in left.kept["0"]
    assert [name for name, _ in fp8.float8_linears(network)] == ["2"]
    x = torch.randn(4, 32)
    assert torch.equal(network[0](x), F.linear(x, network[0].weight, network[0].bias))
    assert set(scaling.scale_state(network)) == {f"2.{kind}" for kind in ("scale", "amax_history", "overflow_share")}
    assert scaling.fall_back(network, left, step=41) is left


def test_a_step_that_is_not_finite_leaves_no_trace_in_the_scales():
    network = small_network(PLAN)
    network[0](torch.full((4, 32), 2.0))
    scaling.update_scales(network, PLAN)
    before = scaling.scale_state(network)["0.scale"]
    network[0](torch.full((4, 32), float("inf")))
    scaling.update_scales(network, PLAN)
    assert torch.equal(scaling.scale_state(network)["0.scale"], before)
    assert network[0].amax_history.isfinite().all()


@pytest.mark.parametrize("counts", [{"states of text": 8}, {"image tokens": 256, "states of text": 77}])
def test_rows_that_products_on_a_gpu_refuse(counts):
    with pytest.raises(ValueError, match="multiples of 16"):
        check_rows(1, counts)
    check_rows(16, counts)
