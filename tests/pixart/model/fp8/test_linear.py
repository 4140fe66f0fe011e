"""FP8 linears: every code of both formats, GEMMs against a naive reference, scales, histories, state."""

import bisect

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pixart.model.fp8 import linear as fp8
from pixart.model.fp8 import ops, scaling
from pixart.model.fp8.ops import CHUNK_SIZE, E4M3, E5M2, FORMATS, GRAD_OUTPUT, INPUT, SLOTS, WEIGHT
from pixart.model.fp8.plan import Plan, check_gemm_alignment
from tests.support.fp8_models import sqnr


def all_codes(fmt: ops.Format) -> torch.Tensor:
    values = torch.arange(256, dtype=torch.uint8).view(fmt.dtype).float()
    return values[values.isfinite()]


def quantize_dequantize(x: torch.Tensor, scale: torch.Tensor, fmt: ops.Format) -> torch.Tensor:
    """Quantize and dequantize with torch's cast."""
    return (x * scale).clamp(-fmt.max, fmt.max).to(fmt.dtype).float() / scale


@pytest.mark.parametrize("fmt", FORMATS[1:], ids=["E4M3", "E5M2"])
def test_every_code_rounds_to_itself(fmt):
    codes = all_codes(fmt)
    assert len(codes) in (254, 248)
    assert codes.max() == fmt.max
    assert torch.equal(ops.round_to_format_(codes.clone(), fmt), codes)


@pytest.mark.parametrize("fmt", FORMATS[1:], ids=["E4M3", "E5M2"])
def test_rounding_equals_the_cast(fmt):
    """For every midpoint and its neighbors, including subnormals, and every bfloat16 value in range."""
    codes = all_codes(fmt).unique().double()
    midpoints = ((codes[1:] + codes[:-1]) / 2).float()
    infinity = torch.full_like(midpoints, torch.inf)
    bfloat = torch.arange(65536).to(torch.int32).to(torch.int16).view(torch.bfloat16).float()
    values = torch.cat([midpoints, midpoints.nextafter(infinity), midpoints.nextafter(-infinity), bfloat])
    values = values[values.isfinite() & (values.abs() <= fmt.max)]
    assert len(values) > 30_000
    assert torch.equal(ops.round_to_format_(values.clone(), fmt), values.to(fmt.dtype).float())


def test_quantize_saturates():
    values = torch.tensor([1e6, -1e6, 1.0])
    assert ops.quantize(values, torch.tensor(1.0), E4M3).tolist() == [448, -448, 1]
    assert ops.quantize(values, torch.tensor(1.0), E5M2).tolist() == [57344, -57344, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantize_in_chunks(dtype):
    """A transposed tensor larger than a chunk has the values of a cast of the full tensor."""
    x = torch.randn(300, 257).to(dtype).t()
    assert x.numel() > 2 * CHUNK_SIZE
    expected = (x.float() * 3).clamp(-448, 448).to(E4M3.dtype).float()
    assert torch.equal(ops.quantize(x, torch.tensor(3.0), E4M3), expected)
    assert torch.equal(ops.quantize(x, torch.full((300,), 3.0), E4M3), expected)


@pytest.mark.parametrize("amax", [0.0, float("inf"), float("nan"), 1e-45])
def test_unusable_amax_keeps_the_scale(amax):
    assert scaling.scale_from_amax(torch.tensor(amax), torch.tensor(3.0), 448.0) == 3


def test_scale_maps_amax_to_the_format_maximum():
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
def test_swap_rejects_modules_that_are_not_linears(name):
    with pytest.raises(ValueError, match=name):
        fp8.swap_linears(nn.Sequential(nn.Linear(2, 2), nn.SiLU()), Plan(linears=(name,)))


def test_the_three_gemms_against_torch_casts():
    network = small_network(PLAN)
    linear = network[0]
    x = torch.randn(64, 32, requires_grad=True)
    grad = torch.randn(64, 48) * 1e-6
    amax = torch.stack([x.detach().abs().max(), linear.weight.detach().abs().max(), grad.abs().max()])
    scaling.load_scale_state(network, scaling.calibrated_state({"0": amax, "2": torch.ones(3)}, PLAN))
    linear(x).backward(grad)

    x8, weight8 = (
        quantize_dequantize(x.detach(), linear.scale[INPUT], E4M3),
        quantize_dequantize(linear.weight.detach(), linear.scale[WEIGHT], E4M3),
    )
    grad8 = quantize_dequantize(grad, linear.scale[GRAD_OUTPUT], E5M2)
    assert torch.allclose(linear(x), F.linear(x8, weight8, linear.bias), atol=1e-5)
    assert torch.allclose(x.grad, grad8 @ weight8, rtol=1e-4, atol=1e-12)
    assert torch.allclose(linear.weight.grad, grad8.t() @ x8, rtol=1e-4, atol=1e-11)
    assert torch.equal(linear.bias.grad, grad.sum(0))  # no GEMM, hence exact
    assert sqnr(F.linear(x, linear.weight, linear.bias), linear(x)) > 25
    assert sqnr(grad.t() @ x.detach(), linear.weight.grad) > 20


def test_gradients_underflow_without_their_scale():
    """Why grad_output is calibrated: 1e-6 is below E5M2's smallest subnormal, 1.5e-5."""
    network = small_network(PLAN)
    network[0](torch.randn(64, 32)).backward(torch.randn(64, 48) * 1e-6)
    assert network[0].weight.grad.abs().max() == 0


def test_bfloat16_stays_bfloat16():
    network = small_network(PLAN).bfloat16()
    x = torch.randn(4, 32, dtype=torch.bfloat16, requires_grad=True)
    out = network[0](x)
    out.sum().backward()
    assert (out.dtype, x.grad.dtype, network[0].weight.grad.dtype) == (torch.bfloat16,) * 3


def test_amax_is_recorded_with_gradients_only_and_history_rolls():
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
    expected = [(x * step).abs().max() for step in (3, 4, 5)]
    assert torch.equal(network[0].amax_history[1:, INPUT], torch.stack(expected))
    assert network[0].scale[INPUT] == 448 / expected[-1]
    scaling.update_scales(network, PLAN)
    scaling.update_scales(network, PLAN)
    scaling.update_scales(network, PLAN)
    assert network[0].scale[INPUT] == 448 / expected[-1]  # no tensor was measured: the scale is kept


def test_backward_uses_the_scales_of_its_forward_pass():
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


def test_no_weight_gradient_for_frozen_parameters():
    network = small_network(PLAN)
    network.requires_grad_(False)
    x = torch.randn(8, 32, requires_grad=True)
    network(x).sum().backward()
    assert x.grad is not None
    assert network[0].weight.grad is None
    assert network[0].amax_history[0, GRAD_OUTPUT] > 0


def test_scale_state_round_trip_and_errors():
    network = small_network(PLAN)
    scaling.load_scale_state(
        network, scaling.calibrated_state({"0": torch.tensor([1.0, 2.0, 0.0]), "2": torch.ones(3)}, PLAN)
    )
    state = scaling.scale_state(network)
    assert set(state) == {
        f"{name}.{kind}" for name in ("0", "2") for kind in ("scale", "amax_history", "overflow_share")
    }
    assert state["0.scale"].tolist() == [448, 224, 1]  # the last slot was not measured
    assert state["0.amax_history"].shape == (4, len(SLOTS))
    loaded = small_network(PLAN)
    scaling.load_scale_state(loaded, state)
    for key, value in scaling.scale_state(loaded).items():
        assert torch.equal(value, state[key])
    with pytest.raises(ValueError, match="missing"):
        scaling.load_scale_state(loaded, {"0.scale": state["0.scale"]})
    with pytest.raises(ValueError, match="shape"):
        scaling.load_scale_state(loaded, {**state, "0.scale": torch.ones(2)})


def test_scales_of_the_first_checkpoints_are_loaded():
    """Their saturation rate is stored as `overflow_share`."""
    names = [f"{linear}.{buffer}" for linear in ("0", "2") for buffer in ("scale", "amax_history", "overflow_share")]
    shapes = {"scale": (3,), "amax_history": (4, 3), "overflow_share": (3,)}
    stored = {name: torch.rand(shapes[name.partition(".")[2]]) for name in names}
    network = small_network(PLAN)
    scaling.load_scale_state(network, stored)
    assert torch.equal(network[0].scale, stored["0.scale"])
    assert torch.equal(network[0].amax_history, stored["0.amax_history"])
    assert torch.equal(network[2].saturation_rate, stored["2.overflow_share"])


def test_gradient_scales_are_rescaled_with_the_batch_size():
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
    """Delayed scaling of one tensor in plain Python, independent of the implementation."""

    def __init__(self, fmt: ops.Format, history: int, margin: int) -> None:
        self.values = sorted(set(all_codes(fmt).tolist()))
        self.even = [index % 2 == 0 for index in self.codes_of_positives(fmt)]
        self.max, self.margin, self.length = fmt.max, margin, history
        self.scale, self.amax_history = np.float32(1), []

    @staticmethod
    def codes_of_positives(fmt: ops.Format) -> range:
        return range(int(torch.tensor(fmt.max).to(fmt.dtype).view(torch.uint8)) + 1)

    def round(self, value: float) -> float:
        """Round to the nearest value of the format, ties to the even code."""
        value = max(-self.max, min(self.max, value))
        index = bisect.bisect_left(self.values, value)
        if self.values[index] == value:
            return value
        low, high = self.values[index - 1], self.values[index]
        if value - low != high - value:
            return low if value - low < high - value else high
        positives = [code for code in self.values if code >= 0]
        return low if self.even[positives.index(abs(low))] else high

    def step(self, tensor: torch.Tensor) -> tuple[float, float, list[float]]:
        """Return amax, the scale of this step and the quantized values, and update the scale."""
        flat = tensor.flatten().tolist()
        scale, amax = self.scale, max(map(abs, flat))
        quantized = [self.round(float(np.float32(value) * scale)) for value in flat]
        self.amax_history = [*self.amax_history, amax][-self.length :]
        if max(self.amax_history) > 0:
            self.scale = np.float32(self.max) / np.float32(max(self.amax_history)) / np.float32(2.0**self.margin)
        return amax, float(scale), quantized


def test_fifty_steps_against_delayed_scaling_in_plain_python(monkeypatch):
    """Amax, scale and quantized values of each tensor of each linear are equal bit for bit."""
    plan = Plan(linears=("0", "2"), history=5, margin=1)
    network = small_network(plan)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    original, calls = ops.quantize, []

    def quantize(x, scale, fmt):
        calls.append((x.detach().clone(), float(scale), original(x, scale, fmt)))
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
            amax, expected_scale, expected = references[name, slot].step(tensor)
            linear = network.get_submodule(name)
            assert scale == expected_scale
            assert float(linear.amax_history[-1, slot]) == amax
            assert float(linear.scale[slot]) == references[name, slot].scale
            assert quantized.flatten().tolist() == expected
            compared += len(expected)
    assert compared > 100_000


def test_a_saturating_linear_falls_back_to_bf16():
    """The input of linear 0 doubles at each step, faster than delayed scaling follows; that of linear 2 is constant."""
    plan, network = PLAN, small_network(PLAN)
    for step in range(40):
        network[0](torch.full((4, 32), 2.0**step))
        network[2](torch.ones(4, 48))
        scaling.update_scales(network, plan)
    metrics = scaling.fp8_metrics(network)
    assert metrics["saturation_rate"]["0.input"] > 0.5
    assert metrics["saturation_rate"]["2.input"] < 0.1
    assert metrics["headroom"]["2.input"] == 0  # the scale maps the last amax to the maximum
    assert metrics["scale"]["2.input"] == 448
    remaining = scaling.fall_back_to_bf16(network, plan, step=40)
    assert remaining.linears == ("2",)
    assert "saturated in 7" in remaining.kept["0"]
    assert [name for name, _ in fp8.float8_linears(network)] == ["2"]
    x = torch.randn(4, 32)
    assert torch.equal(network[0](x), F.linear(x, network[0].weight, network[0].bias))
    assert set(scaling.scale_state(network)) == {f"2.{kind}" for kind in ("scale", "amax_history", "overflow_share")}
    assert scaling.fall_back_to_bf16(network, remaining, step=41) is remaining


def test_a_non_finite_step_does_not_change_the_scales():
    network = small_network(PLAN)
    network[0](torch.full((4, 32), 2.0))
    scaling.update_scales(network, PLAN)
    before = scaling.scale_state(network)["0.scale"]
    network[0](torch.full((4, 32), float("inf")))
    scaling.update_scales(network, PLAN)
    assert torch.equal(scaling.scale_state(network)["0.scale"], before)
    assert network[0].amax_history.isfinite().all()


@pytest.mark.parametrize("counts", [{"text tokens": 8}, {"image tokens": 256, "text tokens": 77}])
def test_misaligned_rows_are_rejected(counts):
    with pytest.raises(ValueError, match="multiple of 16"):
        check_gemm_alignment(1, counts)
    check_gemm_alignment(16, counts)
