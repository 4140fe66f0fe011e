"""Figures of a linear: against real casts in float64, and of some of its outputs against all."""

import pytest
import torch

from conversion.verification import quantization_error
from conversion.verification.quantization_error import LayerFigures
from pixart.model.fp8.ops import FORMATS

SCALE = torch.tensor([70.0, 1000.0, 5e8])


def tensors(rows: int = 96, width: int = 64, out: int = 320) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, width, generator=generator), 0.02 * torch.randn(out, width, generator=generator)
    weight[3] *= 4  # amax is of one output, which may not be among those sampled
    return x, weight, 1e-5 * torch.randn(rows, out, generator=generator)


def decibels(exact: torch.Tensor, got: torch.Tensor) -> float:
    return float(10 * torch.log10(exact.square().sum() / (exact - got).square().sum()))


def by_hand(batches: list[tuple[torch.Tensor, ...]], scales: list[torch.Tensor] | None) -> dict[str, float]:
    """SQNR by real casts; without scales by each tensor's own amax."""
    exact: dict[str, list[torch.Tensor]] = {}
    got: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        own = scales or [fmt.max / tensor.abs().max() for tensor, fmt in zip(batch, FORMATS, strict=True)]
        casts = [
            (tensor * scale).clamp(-fmt.max, fmt.max).to(fmt.dtype).double() / scale
            for tensor, scale, fmt in zip(batch, own, FORMATS, strict=True)
        ]
        for found, (x, weight, grad) in ((exact, [tensor.double() for tensor in batch]), (got, casts)):
            products = {"input": x, "weight": weight, "output": x @ weight.t(), "weight_gradient": grad.t() @ x}
            for name, product in products.items():
                found.setdefault(name, []).append(product)
    return {name: decibels(torch.stack(exact[name]), torch.stack(got[name])) for name in exact}


@pytest.mark.parametrize("together", [False, True], ids=["one by one", "together"])
def test_against_real_casts(together):
    batches = [tensors(), tuple(1.5 * tensor for tensor in tensors())]
    batches[1] = (batches[1][0], batches[0][1], batches[1][2])  # the weight is the same in every batch
    figures = LayerFigures(SCALE, "delayed")
    for added in [batches] if together else [batches[:1], batches[1:]]:
        figures.add(torch.stack([x for x, _, _ in added]), added[0][1], torch.stack([grad for *_, grad in added]))
    found = figures.report()
    assert found["sqnr"] == pytest.approx(by_hand(batches, list(SCALE)), abs=1e-3)
    assert found["dynamic"] == pytest.approx(by_hand(batches, None), abs=1e-3)
    assert found["amax"] == pytest.approx([float(tensor.abs().max()) for tensor in batches[1]])
    assert found["underflow"][0] < 0.01
    assert found["overflow"] == [0, 0, 0]


def both_ways(monkeypatch, scale: torch.Tensor | None, recipe: str) -> list[dict]:
    """By all outputs, and by a quarter of them."""
    found = []
    for sampled in (1 << 18, 320 * 64 // 4):
        monkeypatch.setattr(quantization_error, "SAMPLED", sampled)
        figures = LayerFigures(scale, recipe)
        x, weight, grad = tensors()
        for _ in range(2):
            figures.add(x[None], weight, grad[None])
        found.append(figures.report())
    return found


@pytest.mark.parametrize("recipe", ["delayed", "current", "rowwise", "mxfp8"])
def test_some_outputs_stand_for_all(monkeypatch, recipe):
    whole, some = both_ways(monkeypatch, SCALE if recipe == "delayed" else None, recipe)
    assert some["amax"] == whole["amax"]
    assert some["headroom"] == whole["headroom"]
    for key in ("sqnr", "dynamic"):
        assert some[key] == pytest.approx(whole[key], abs=0.3)
    if recipe == "delayed":
        gaps = [each["aligned"]["weight_gradient"] - each["sqnr"]["weight_gradient"] for each in (whole, some)]
        assert gaps == pytest.approx([0, 0], abs=0.01)


@pytest.mark.parametrize("output", [5, 8], ids=["among none", "among every fourth"])
def test_what_a_scale_cuts_is_among_them(monkeypatch, output):
    """A gradient's largest output beyond the format's range weighs what it does among all."""
    x, weight, grad = tensors()
    grad[:, output] *= 20
    monkeypatch.setattr("tests.conversion.verification.test_quantization_error.tensors", lambda: (x, weight, grad))
    whole, some = both_ways(monkeypatch, SCALE, "delayed")
    gaps = [each["aligned"]["weight_gradient"] - each["sqnr"]["weight_gradient"] for each in (whole, some)]
    assert gaps[0] > 0.5
    assert gaps[1] == pytest.approx(gaps[0], abs=0.2)
    assert some["overflow"][2] == pytest.approx(whole["overflow"][2], rel=0.1) != 0
    assert some["sqnr"]["weight_gradient"] == pytest.approx(whole["sqnr"]["weight_gradient"], abs=0.2)
