"""Quantization statistics of a linear: against casts to FP8 in float64, and sampled outputs against all outputs."""

import pytest
import torch

from conversion.verification import quantization_error
from conversion.verification.quantization_error import LinearStatistics
from pixart.model.fp8.ops import FORMATS

SCALE = torch.tensor([70.0, 1000.0, 5e8])


def tensors(rows: int = 96, width: int = 64, out: int = 320) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(rows, width, generator=generator), 0.02 * torch.randn(out, width, generator=generator)
    weight[3] *= 4  # this output has the amax and may not be among the sampled ones
    return x, weight, 1e-5 * torch.randn(rows, out, generator=generator)


def sqnr_db(exact: torch.Tensor, actual: torch.Tensor) -> float:
    return float(10 * torch.log10(exact.square().sum() / (exact - actual).square().sum()))


def reference_sqnr_db(batches: list[tuple[torch.Tensor, ...]], scales: list[torch.Tensor] | None) -> dict[str, float]:
    """Return the SQNR with casts to FP8 dtypes; without scales each tensor is scaled by its amax."""
    exact: dict[str, list[torch.Tensor]] = {}
    quantized: dict[str, list[torch.Tensor]] = {}
    for batch in batches:
        batch_scales = scales or [fmt.max / tensor.abs().max() for tensor, fmt in zip(batch, FORMATS, strict=True)]
        casts = [
            (tensor * scale).clamp(-fmt.max, fmt.max).to(fmt.dtype).double() / scale
            for tensor, scale, fmt in zip(batch, batch_scales, FORMATS, strict=True)
        ]
        for result, (x, weight, grad) in ((exact, [tensor.double() for tensor in batch]), (quantized, casts)):
            tensors_by_name = {"input": x, "weight": weight, "output": x @ weight.t(), "grad_weight": grad.t() @ x}
            for name, tensor in tensors_by_name.items():
                result.setdefault(name, []).append(tensor)
    return {name: sqnr_db(torch.stack(exact[name]), torch.stack(quantized[name])) for name in exact}


@pytest.mark.parametrize("in_one_call", [False, True], ids=["one call per batch", "one call"])
def test_against_casts_to_fp8(in_one_call):
    batches = [tensors(), tuple(1.5 * tensor for tensor in tensors())]
    batches[1] = (batches[1][0], batches[0][1], batches[1][2])  # the weight is the same in every batch
    statistics = LinearStatistics(SCALE, "delayed")
    for added in [batches] if in_one_call else [batches[:1], batches[1:]]:
        statistics.add(torch.stack([x for x, _, _ in added]), added[0][1], torch.stack([grad for *_, grad in added]))
    report = statistics.report()
    assert report["sqnr_db"] == pytest.approx(reference_sqnr_db(batches, list(SCALE)), abs=1e-3)
    assert report["dynamic_sqnr_db"] == pytest.approx(reference_sqnr_db(batches, None), abs=1e-3)
    assert report["amax"] == pytest.approx([float(tensor.abs().max()) for tensor in batches[1]])
    assert report["underflow_rate"][0] < 0.01
    assert report["saturation_rate"] == [0, 0, 0]


def complete_and_sampled(monkeypatch, scale: torch.Tensor | None, recipe: str) -> list[dict]:
    """Return the reports over all outputs and over a sample of a quarter of them."""
    reports = []
    for sampled in (1 << 18, 320 * 64 // 4):
        monkeypatch.setattr(quantization_error, "MAX_SAMPLED_WEIGHTS", sampled)
        statistics = LinearStatistics(scale, recipe)
        x, weight, grad = tensors()
        for _ in range(2):
            statistics.add(x[None], weight, grad[None])
        reports.append(statistics.report())
    return reports


@pytest.mark.parametrize("recipe", ["delayed", "current", "rowwise", "mxfp8"])
def test_sampled_outputs_represent_all(monkeypatch, recipe):
    complete, sampled = complete_and_sampled(monkeypatch, SCALE if recipe == "delayed" else None, recipe)
    assert sampled["amax"] == complete["amax"]
    assert sampled["headroom_bits"] == complete["headroom_bits"]
    for key in ("sqnr_db", "dynamic_sqnr_db"):
        assert sampled[key] == pytest.approx(complete[key], abs=0.3)
    if recipe == "delayed":
        gaps = [
            report["aligned_dynamic_sqnr_db"]["grad_weight"] - report["sqnr_db"]["grad_weight"]
            for report in (complete, sampled)
        ]
        assert gaps == pytest.approx([0, 0], abs=0.01)


@pytest.mark.parametrize("output", [5, 8], ids=["between samples", "regular sample"])
def test_saturated_output_is_always_sampled(monkeypatch, output):
    """A saturated output of the gradient has the same weight in the sample as among all outputs."""
    x, weight, grad = tensors()
    grad[:, output] *= 20
    monkeypatch.setattr("tests.conversion.verification.test_quantization_error.tensors", lambda: (x, weight, grad))
    complete, sampled = complete_and_sampled(monkeypatch, SCALE, "delayed")
    gaps = [
        report["aligned_dynamic_sqnr_db"]["grad_weight"] - report["sqnr_db"]["grad_weight"]
        for report in (complete, sampled)
    ]
    assert gaps[0] > 0.5
    assert gaps[1] == pytest.approx(gaps[0], abs=0.2)
    assert sampled["saturation_rate"][2] == pytest.approx(complete["saturation_rate"][2], rel=0.1) != 0
    assert sampled["sqnr_db"]["grad_weight"] == pytest.approx(complete["sqnr_db"]["grad_weight"], abs=0.2)
