"""Quantization error of every FP8 linear on validation batches: amax, headroom, underflow, saturation and SQNR.

The signal-to-quantization-noise ratio (SQNR) is 10 log10(sum of squares / sum of squared errors), in dB. For a large
linear it is estimated from some of its outputs, quantized with the scales of the complete tensors: every n-th output,
with a sampling weight of n, and the outputs with the largest values, which saturate first.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from conversion.batches import CalibrationBatch
from conversion.calibration.amax import max_magnitude, observe_linears
from pixart.checkpoint.directory import Checkpoint
from pixart.model.dit import DiT
from pixart.model.fp8.ops import E4M3, E5M2, FORMATS, GRAD_OUTPUT, INPUT, SLOTS, Format, fake_quantize

MX_BLOCK = 32  # values that share a scale (OCP Microscaling Formats, version 1.0)
MX_EXPONENTS = (-126, 126)  # range of a block's scale
MAX_GRAD_PARAMETERS = 32_000_000  # of the linears whose weight gradients are compared
MAX_SAMPLED_WEIGHTS = 1 << 16  # of a linear; a linear with less than twice as many is measured completely


def fake_quantize_dynamic(x: Tensor, fmt: Format, recipe: str) -> Tensor:
    """Quantize and dequantize x under a recipe with dynamic scales; the last dimension is the GEMM's reduction.

    MXFP8 quantizes gradients to E4M3 too.
    """
    if recipe == "mxfp8":
        blocks = F.pad(x.float(), (0, -x.shape[-1] % MX_BLOCK)).unflatten(-1, (-1, MX_BLOCK))
        exponent = torch.ceil(torch.log2(blocks.abs().amax(-1, keepdim=True) / E4M3.max)).clamp(*MX_EXPONENTS)
        return fake_quantize(blocks, torch.exp2(-exponent), E4M3).flatten(-2)[..., : x.shape[-1]]
    amax = x.abs().amax(-1, keepdim=True) if recipe == "rowwise" else max_magnitude(x, fmt)
    return fake_quantize(x, dynamic_scale(amax, fmt), fmt)


def dynamic_scale(amax: Tensor, fmt: Format) -> Tensor:
    return torch.where(amax > 0, fmt.max / amax.float(), 1.0)


SquareSums = dict[str, Tensor]  # by tensor name, sums of squares of the signal and of its error (2,)
OUTPUT_DIM = {"weight": -2, "grad_weight": -2, "output": -1, "grad_output": -1}  # dimension of a linear's outputs


def weighted_sum(name: str, values: Tensor, sample_weight: Tensor) -> Tensor:
    """Estimate the sum over the complete tensor from sampled outputs with their sampling weights -> ()."""
    if name not in OUTPUT_DIM:
        return values.sum(dtype=torch.float32).double()
    other_dims = [dim for dim in range(-values.dim(), 0) if dim != OUTPUT_DIM[name]]
    return (values.sum(other_dims, dtype=torch.float32) @ sample_weight).double()


def square_sums(name: str, exact: Tensor, actual: Tensor, sample_weight: Tensor) -> Tensor:
    """Return the sums of squares of `exact` and of the error of `actual` -> (2,)."""
    signal = weighted_sum(name, exact.square(), sample_weight)
    return torch.stack([signal, weighted_sum(name, (actual - exact).square_(), sample_weight)])


def sqnr_db(sums: Mapping[str, Tensor]) -> dict[str, float | None]:
    """Return the SQNR in dB by tensor name; None if there is no signal, or no error."""
    return {
        name: float(10 * torch.log10(pair[0] / pair[1])) if (pair > 0).all() else None for name, pair in sums.items()
    }


class LinearStatistics:
    """Quantization statistics of one linear, accumulated over batches: amax, headroom, error rates and SQNR."""

    def __init__(self, scale: Tensor | None, recipe: str) -> None:
        """`scale` (3,) holds the calibrated scales by slot; None for a recipe without stored scales."""
        self.scale, self.recipe = scale, recipe
        self.sampled_outputs = (0, 0)  # number of sampled outputs, and of all
        self.amax = torch.zeros(len(FORMATS), dtype=torch.float64)
        self.rates = torch.zeros(2, len(FORMATS), dtype=torch.float64)  # underflow and saturation, summed over batches
        self.batches = 0
        self.output_amax: Tensor | None = None  # of the weight, by output
        self.sums: dict[str, SquareSums] = {}

    def add(self, x: Tensor, weight: Tensor, grad: Tensor) -> None:
        """Add batches: x (batches, rows, in), weight (out, in), grad (batches, rows, out).

        Dynamic scales are computed for each batch separately.
        """
        if self.output_amax is None:  # the weight is the same in every batch
            self.output_amax = max_magnitudes(weight, 1)
        grad_amax = max_magnitudes(grad, 1)
        amax = [max_magnitudes(x, (1, 2)), self.output_amax.amax()[None], grad_amax.amax(1)]
        stride = max(1, weight.numel() // MAX_SAMPLED_WEIGHTS)
        sample_weight = torch.zeros(len(weight), device=weight.device)  # number of outputs that each one represents
        sample_weight[::stride] = stride
        sample_weight[self.output_amax.argmax()] = sample_weight[grad_amax.argmax(1)] = 1
        outputs = sample_weight.nonzero().flatten()
        self.sampled_outputs = max(self.sampled_outputs, (len(outputs), len(weight)))
        sample_weight = sample_weight[outputs]
        tensors = x.float(), weight[outputs].float(), grad[..., outputs].float()
        exact = linear_tensors(*tensors)
        if self.batches:
            del exact["weight"]
        self.batches += len(x)
        self.amax = self.amax.maximum(torch.stack([values.amax() for values in amax]).double().cpu())
        scales = [dynamic_scale(values, fmt) for values, fmt in zip(amax, FORMATS, strict=True)]
        dynamic = linear_tensors(*fake_quantize_all(tensors, scales))
        self.accumulate("dynamic_sqnr_db", exact, dynamic, sample_weight)
        if self.scale is None:
            is_dynamic = self.recipe == "current"
            quantized = dynamic if is_dynamic else linear_tensors_by_recipe(*tensors, self.recipe)
            self.accumulate("sqnr_db", exact, quantized, sample_weight)
            return
        scale = self.scale.to(x.device)
        casts = fake_quantize_all(tensors, scale)
        self.accumulate("sqnr_db", exact, linear_tensors(*casts), sample_weight)
        aligned = [aligned_scale(*args) for args in zip(amax, scale, FORMATS, strict=True)]
        aligned_tensors = linear_tensors(*fake_quantize_all(tensors, aligned))
        self.accumulate("aligned_dynamic_sqnr_db", exact, aligned_tensors, sample_weight)
        uncalibrated = fake_quantize(tensors[GRAD_OUTPUT], scale.new_ones(()), E5M2)
        self.accumulate("forward_only_sqnr_db", exact, {"grad_weight": uncalibrated.mT @ casts[INPUT]}, sample_weight)
        for slot, (name, tensor, fmt) in enumerate(zip(SLOTS, tensors, FORMATS, strict=True)):
            size = (x, weight, grad)[slot].numel() / len(x)
            underflows = (casts[slot] == 0) & (tensor != 0)
            saturates = tensor.abs() > fmt.max / scale[slot]
            self.rates[0, slot] += weighted_sum(name, underflows, sample_weight).cpu() / size
            self.rates[1, slot] += weighted_sum(name, saturates, sample_weight).cpu() / size

    def accumulate(
        self, key: str, exact: Mapping[str, Tensor], actual: Mapping[str, Tensor], sample_weight: Tensor
    ) -> None:
        sums = self.sums.setdefault(key, {})
        for name, tensor in actual.items():
            if name in exact:
                sums[name] = sums.get(name, 0) + square_sums(name, exact[name], tensor, sample_weight)

    def report(self) -> dict[str, Any]:
        """Return the statistics for the report; headroom is in bits, that is, powers of two."""
        missing = [None] * len(FORMATS)
        result: dict[str, Any] = {"sampled_outputs": self.sampled_outputs, "amax": self.amax.tolist()}
        result |= dict.fromkeys(("headroom_bits", "underflow_rate", "saturation_rate"), missing)
        if self.scale is not None:
            scaled_amax = self.amax * self.scale.cpu()
            ratios = [
                fmt.max / float(value) if value else None for fmt, value in zip(FORMATS, scaled_amax, strict=True)
            ]
            result["headroom_bits"] = [ratio and math.log2(ratio) for ratio in ratios]
            result["underflow_rate"], result["saturation_rate"] = (self.rates / self.batches).tolist()
        return result | {key: sqnr_db(sums) for key, sums in self.sums.items()}


def max_magnitudes(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Return the maximum of |x| over `dim`, in float32; several times faster than `torch.linalg.vector_norm`."""
    return torch.maximum(x.amax(dim), -x.amin(dim)).float()


def fake_quantize_all(tensors: Sequence[Tensor], scales: Iterable[Tensor]) -> list[Tensor]:
    """Quantize and dequantize input, weight and grad_output.

    Each scale is a single one, () or (1,), or one per batch (batches,).
    """
    shaped = (scale.view(()) if scale.numel() == 1 else scale.view(-1, 1, 1) for scale in scales)
    return [fake_quantize(*args) for args in zip(tensors, shaped, FORMATS, strict=True)]


def aligned_scale(amax: Tensor, calibrated: Tensor, fmt: Format) -> Tensor:
    """Return the calibrated scale times the power of two that scales it closest below the dynamic scale.

    Scales that differ by a power of two round in-range values alike. If a few values dominate a product, their rounding
    errors would otherwise outweigh what the comparison is about: whether the calibrated scale keeps values in range.
    """
    ratio = fmt.max / amax / calibrated
    return calibrated * torch.exp2(torch.floor(torch.log2(torch.where(ratio.isfinite(), ratio, 1.0))))


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """Measurements of a BF16 model on validation batches, and the quantization statistics of its linears."""

    layers: list[dict[str, Any]]  # of each planned linear that a gradient reaches
    loss: float
    grads: dict[str, Tensor]  # grad_weight (out, in) of some linears, over the first pass


def observe(model: DiT, checkpoint: Checkpoint, batches: Sequence[CalibrationBatch]) -> Observation:
    """Measure the quantization statistics of every planned linear, with the checkpoint's scales."""
    plan, scales = checkpoint.plan, checkpoint.scales
    assert plan is not None
    sampled = sample_linears(model, plan.linears)
    inputs: dict[str, Tensor] = {}
    statistics: dict[str, LinearStatistics] = {}
    grads: dict[str, Tensor] = {}

    def visit(name: str, slot: int, tensor: Tensor) -> None:
        if slot == INPUT:
            inputs[name] = tensor
        if slot == GRAD_OUTPUT:
            linear = statistics.setdefault(name, LinearStatistics(scales.get(f"{name}.scale"), plan.recipe))
            x = inputs.pop(name)
            linear.add(x, model.get_submodule(name).weight.detach(), tensor)
            if name in sampled and name not in grads:
                grads[name] = tensor.flatten(0, 1).float().t() @ x.flatten(0, 1).float()

    losses = observe_linears(model, plan.linears, dict(enumerate(batches)), visit)
    layers = [{"name": name, **statistics[name].report()} for name in plan.linears if name in statistics]
    return Observation(layers=layers, loss=float(losses.mean()), grads=grads)


def sample_linears(model: DiT, linears: Sequence[str]) -> Sequence[str]:
    """Return every n-th linear, so that their weights have at most MAX_GRAD_PARAMETERS parameters."""
    parameters = sum(model.get_submodule(name).weight.numel() for name in linears)
    return linears[:: max(1, -(-parameters // MAX_GRAD_PARAMETERS))]


def linear_tensors(x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Return the tensors whose SQNR is reported, from input, weight and grad_output."""
    return {"input": x, "weight": weight, "output": x @ weight.t(), "grad_weight": grad.mT @ x}


def linear_tensors_by_recipe(x: Tensor, weight: Tensor, grad: Tensor, recipe: str) -> dict[str, Tensor]:
    """Return `linear_tensors` under a dynamic recipe, each operand quantized along its GEMM's reduction dimension."""
    result = linear_tensors(fake_quantize_dynamic(x, E4M3, recipe), fake_quantize_dynamic(weight, E4M3, recipe), grad)
    by_column = [fake_quantize_dynamic(tensor.mT, fmt, recipe) for tensor, fmt in ((grad, E5M2), (x, E4M3))]
    return result | {"grad_weight": by_column[0] @ by_column[1].mT}
