"""What FP8 does to every linear, on batches held out: amax, headroom, shares of values lost, and noise.

Signal to quantization noise (SQNR) is 10 log10(sum of squares / sum of squared errors), in dB. Of a large linear it
is taken over some of its outputs, with the scales that the whole tensors have: every n-th, which stands for n, and
those of the largest values, which a scale cuts first.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from conversion.batches import CalibrationBatch
from conversion.calibration.amax import largest, watch
from pixart.checkpoint.directory import Checkpoint
from pixart.model.dit import DiT
from pixart.model.fp8.ops import E4M3, E5M2, FORMATS, GRAD_OUTPUT, INPUT, SLOTS, Format, fake_quantize

MX_BLOCK = 32  # values that share a scale (OCP Microscaling Formats, version 1.0)
MX_EXPONENTS = (-126, 126)  # of a block's scale
GRADIENT_PARAMETERS = 32_000_000  # at most, of the linears whose gradients are compared
SAMPLED = 1 << 16  # weights of a linear that figures are taken over; all of them where it has less than twice as many


def cast_by_recipe(x: Tensor, fmt: Format, recipe: str) -> Tensor:
    """x as it comes out of a recipe that measures its scales; the last dimension is the one that a product sums over.

    MXFP8 keeps E4M3 for gradients too.
    """
    if recipe == "mxfp8":
        blocks = F.pad(x.float(), (0, -x.shape[-1] % MX_BLOCK)).unflatten(-1, (-1, MX_BLOCK))
        exponent = torch.ceil(torch.log2(blocks.abs().amax(-1, keepdim=True) / E4M3.max)).clamp(*MX_EXPONENTS)
        return fake_quantize(blocks, torch.exp2(-exponent), E4M3).flatten(-2)[..., : x.shape[-1]]
    amax = x.abs().amax(-1, keepdim=True) if recipe == "rowwise" else largest(x, fmt)
    return fake_quantize(x, dynamic_scale(amax, fmt), fmt)


def dynamic_scale(amax: Tensor, fmt: Format) -> Tensor:
    return torch.where(amax > 0, fmt.max / amax.float(), 1.0)


Squares = dict[str, Tensor]  # by name, sums of squares of the signal and of its error (2,)
OUTPUTS = {"weight": -2, "weight_gradient": -2, "output": -1, "grad_output": -1}  # the dimension of a linear's outputs


def total(name: str, values: Tensor, share: Tensor) -> Tensor:
    """The sum over all of a linear, of values of outputs that stand for as many as `share` says."""
    if name not in OUTPUTS:
        return values.sum(dtype=torch.float32).double()
    others = [dim for dim in range(-values.dim(), 0) if dim != OUTPUTS[name]]
    return (values.sum(others, dtype=torch.float32) @ share).double()


def squares(name: str, exact: Tensor, got: Tensor, share: Tensor) -> Tensor:
    return torch.stack([total(name, exact.square(), share), total(name, (got - exact).square_(), share)])


def decibels(sums: Mapping[str, Tensor]) -> dict[str, float | None]:
    """None where there is no signal, or no error."""
    return {name: float(10 * torch.log10(own[0] / own[1])) if (own > 0).all() else None for name, own in sums.items()}


class LayerFigures:
    """Of one linear, over all batches shown: amax, headroom, shares of values lost, and SQNR."""

    def __init__(self, scale: Tensor | None, recipe: str) -> None:
        """`scale` (3,), or none for a recipe without."""
        self.scale, self.recipe = scale, recipe
        self.outputs = (0, 0)  # that figures are of, and those that there are
        self.amax = torch.zeros(len(FORMATS), dtype=torch.float64)
        self.lost = torch.zeros(2, len(FORMATS), dtype=torch.float64)  # underflow and overflow, sums of shares
        self.batches = 0
        self.largest_weights: Tensor | None = None  # of each output
        self.sums: dict[str, Squares] = {}

    def add(self, x: Tensor, weight: Tensor, grad: Tensor) -> None:
        """x (batches, rows, in), weight (out, in), grad (batches, rows, out); dynamic scaling is each batch's own."""
        if self.largest_weights is None:  # the weight is the same in every batch
            self.largest_weights = largest_magnitudes(weight, 1)
        largest_gradients = largest_magnitudes(grad, 1)
        amax = [largest_magnitudes(x, (1, 2)), self.largest_weights.amax()[None], largest_gradients.amax(1)]
        every = max(1, weight.numel() // SAMPLED)
        share = torch.zeros(len(weight), device=weight.device)  # how many outputs each stands for
        share[::every] = every
        share[self.largest_weights.argmax()] = share[largest_gradients.argmax(1)] = 1
        outputs = share.nonzero().flatten()
        self.outputs = max(self.outputs, (len(outputs), len(weight)))
        share = share[outputs]
        tensors = x.float(), weight[outputs].float(), grad[..., outputs].float()
        exact = products(*tensors)
        if self.batches:
            del exact["weight"]
        self.batches += len(x)
        self.amax = self.amax.maximum(torch.stack([own.amax() for own in amax]).double().cpu())
        dynamic = products(*cast_all(tensors, [dynamic_scale(*own) for own in zip(amax, FORMATS, strict=True)]))
        self.compare("dynamic", exact, dynamic, share)
        if self.scale is None:
            is_dynamic = self.recipe == "current"
            own = dynamic if is_dynamic else products_by_recipe(*tensors, self.recipe)
            self.compare("sqnr", exact, own, share)
            return
        scale = self.scale.to(x.device)
        casts = cast_all(tensors, scale)
        self.compare("sqnr", exact, products(*casts), share)
        aligned = [aligned_scale(*own) for own in zip(amax, scale, FORMATS, strict=True)]
        self.compare("aligned", exact, products(*cast_all(tensors, aligned)), share)
        uncalibrated = fake_quantize(tensors[GRAD_OUTPUT], scale.new_ones(()), E5M2)
        self.compare("forward_only", exact, {"weight_gradient": uncalibrated.mT @ casts[INPUT]}, share)
        for slot, (name, tensor, fmt) in enumerate(zip(SLOTS, tensors, FORMATS, strict=True)):
            whole = (x, weight, grad)[slot].numel() / len(x)
            vanished = (casts[slot] == 0) & (tensor != 0)
            self.lost[0, slot] += total(name, vanished, share).cpu() / whole
            self.lost[1, slot] += total(name, tensor.abs() > fmt.max / scale[slot], share).cpu() / whole

    def compare(self, key: str, exact: Mapping[str, Tensor], got: Mapping[str, Tensor], share: Tensor) -> None:
        own = self.sums.setdefault(key, {})
        for name, tensor in got.items():
            if name in exact:
                own[name] = own.get(name, 0) + squares(name, exact[name], tensor, share)

    def report(self) -> dict[str, Any]:
        nothing = [None] * len(FORMATS)
        found: dict[str, Any] = {"outputs": self.outputs, "amax": self.amax.tolist()}
        found |= dict.fromkeys(("headroom", "underflow", "overflow"), nothing)
        if self.scale is not None:
            top = self.amax * self.scale.cpu()
            room = [fmt.max / float(value) if value else None for fmt, value in zip(FORMATS, top, strict=True)]
            found["headroom"] = [value and math.log2(value) for value in room]
            found["underflow"], found["overflow"] = (self.lost / self.batches).tolist()
        return found | {key: decibels(own) for key, own in self.sums.items()}


def largest_magnitudes(x: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """In float32; several times faster than the norm that says the same."""
    return torch.maximum(x.amax(dim), -x.amin(dim)).float()


def cast_all(tensors: Sequence[Tensor], scales: Iterable[Tensor]) -> list[Tensor]:
    """By one scale each () or (1,), or by one of each batch (batches,)."""
    shaped = (scale.view(()) if scale.numel() == 1 else scale.view(-1, 1, 1) for scale in scales)
    return [fake_quantize(*own) for own in zip(tensors, shaped, FORMATS, strict=True)]


def aligned_scale(amax: Tensor, calibrated: Tensor, fmt: Format) -> Tensor:
    """Dynamic scaling's, but for less than a power of two, so that both round the same values alike.

    Where a few values make up most of a product, how these happen to round outweighs what a scale is to be judged by:
    whether it keeps them all in range.
    """
    ratio = fmt.max / amax / calibrated
    return calibrated * torch.exp2(torch.floor(torch.log2(torch.where(ratio.isfinite(), ratio, 1.0))))


@dataclass(frozen=True, kw_only=True, slots=True)
class Observed:
    """A model in BF16 on the batches held out, and what FP8 does to each of its linears."""

    layers: list[dict[str, Any]]  # of each linear of the plan that a gradient reaches
    loss: float
    gradients: dict[str, Tensor]  # of some weights (out, in), over the first pass


def observe(model: DiT, checkpoint: Checkpoint, batches: Sequence[CalibrationBatch]) -> Observed:
    plan, scales = checkpoint.plan, checkpoint.scales
    assert plan is not None
    sampled = sample_of_linears(model, plan.linears)
    inputs: dict[str, Tensor] = {}
    found: dict[str, LayerFigures] = {}
    gradients: dict[str, Tensor] = {}

    def visit(name: str, slot: int, tensor: Tensor) -> None:
        if slot == INPUT:
            inputs[name] = tensor
        if slot == GRAD_OUTPUT:
            own = found.setdefault(name, LayerFigures(scales.get(f"{name}.scale"), plan.recipe))
            x = inputs.pop(name)
            own.add(x, model.get_submodule(name).weight.detach(), tensor)
            if name in sampled and name not in gradients:
                gradients[name] = tensor.flatten(0, 1).float().t() @ x.flatten(0, 1).float()

    losses = watch(model, plan.linears, dict(enumerate(batches)), visit)
    layers = [{"name": name, **found[name].report()} for name in plan.linears if name in found]
    return Observed(layers=layers, loss=float(losses.mean()), gradients=gradients)


def sample_of_linears(model: DiT, linears: Sequence[str]) -> Sequence[str]:
    """Every n-th, so that their weights have no more than GRADIENT_PARAMETERS."""
    parameters = sum(model.get_submodule(name).weight.numel() for name in linears)
    return linears[:: max(1, -(-parameters // GRADIENT_PARAMETERS))]


def products(x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Tensor]:
    return {"input": x, "weight": weight, "output": x @ weight.t(), "weight_gradient": grad.mT @ x}


def products_by_recipe(x: Tensor, weight: Tensor, grad: Tensor, recipe: str) -> dict[str, Tensor]:
    """Each tensor is cast along what its product sums over: the weight gradient, over the rows."""
    found = products(cast_by_recipe(x, E4M3, recipe), cast_by_recipe(weight, E4M3, recipe), grad)
    by_column = [cast_by_recipe(tensor.mT, fmt, recipe) for tensor, fmt in ((grad, E5M2), (x, E4M3))]
    return found | {"weight_gradient": by_column[0] @ by_column[1].mT}
