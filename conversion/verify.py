"""Proof of a conversion: what FP8 does to every linear, to the loss and to the gradient, on batches held out.

Signal to quantization noise (SQNR) is 10 log10(sum of squares / sum of squared errors), in dB.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conversion.calibrate import (
    CalibrationBatch,
    batch_loss,
    largest,
    mean_loss,
    recomputed_blocks,
    watch,
    without_class,
)
from conversion.options import STATEFUL
from pixart.checkpoint import Checkpoint, State
from pixart.model import fp8
from pixart.model.dit import DiT, load_model, own_config
from pixart.model.fp8 import Plan
from pixart.model.fp8_products import E4M3, E5M2, FORMATS, GRAD_OUTPUT, INPUT, Format, round_to_format_

MX_BLOCK = 32  # values that share a scale (OCP Microscaling Formats, version 1.0)
MX_EXPONENTS = (-126, 126)  # of a block's scale
GRADIENT_PARAMETERS = 32_000_000  # at most, of the layers whose gradients are compared
# What a conversion must reach to pass.
LOSS_GAP = 0.0025  # DeepSeek-V3 (arXiv 2412.19437), section 3.3: relative loss error of FP8 training against BF16
STAGE_GAP = 0.01
MEAN_DECIBELS, WORST_DECIBELS = 0.1, 0.5  # that calibrated weight gradients may lie below dynamic scaling's


def cast(x: Tensor, scale: Tensor | float, fmt: Format) -> Tensor:
    """x as it comes out of FP8, in float32."""
    return round_to_format_((x.float() * scale).clamp_(-fmt.max, fmt.max), fmt) / scale


def cast_by_recipe(x: Tensor, fmt: Format, recipe: str) -> Tensor:
    """x as it comes out of a recipe that measures its scales; the last dimension is the one that a product sums over.

    MXFP8 keeps E4M3 for gradients too.
    """
    if recipe == "mxfp8":
        blocks = F.pad(x.float(), (0, -x.shape[-1] % MX_BLOCK)).unflatten(-1, (-1, MX_BLOCK))
        exponent = torch.ceil(torch.log2(blocks.abs().amax(-1, keepdim=True) / E4M3.max)).clamp(*MX_EXPONENTS)
        return cast(blocks, torch.exp2(-exponent), E4M3).flatten(-2)[..., : x.shape[-1]]
    amax = x.abs().amax(-1, keepdim=True) if recipe == "rowwise" else largest(x, fmt)
    return cast(x, torch.where(amax > 0, fmt.max / amax.float(), 1.0), fmt)


Squares = dict[str, Tensor]  # by name, sums of squares of the signal and of its error (2,)


def squares(exact: Tensor, got: Tensor) -> Tensor:
    return torch.stack([exact.square().sum(), (got - exact).square_().sum()]).double()


def decibels(sums: Mapping[str, Tensor]) -> dict[str, float | None]:
    """None where there is no signal, or no error."""
    return {name: float(10 * torch.log10(own[0] / own[1])) if (own > 0).all() else None for name, own in sums.items()}


class LayerFigures:
    """Of one linear, over all batches shown: amax, headroom, shares of values lost, and SQNR."""

    def __init__(self, scale: Tensor | None, recipe: str) -> None:
        """`scale` (3,), or none for a recipe without."""
        self.scale, self.recipe = scale, recipe
        self.amax = torch.zeros(len(FORMATS), dtype=torch.float64)
        self.lost = torch.zeros(2, len(FORMATS), dtype=torch.float64)  # underflow and overflow, sums of shares
        self.batches = 0
        self.sums: dict[str, Squares] = {}

    def add(self, x: Tensor, weight: Tensor, grad: Tensor) -> None:
        """x (rows, in), weight (out, in), grad (rows, out)."""
        tensors = x.float(), weight.float(), grad.float()
        exact = products(*tensors)
        if self.batches:
            del exact["weight"]  # is the same in every batch
        self.batches += 1
        self.amax = self.amax.maximum(torch.stack([tensor.abs().amax() for tensor in tensors]).double().cpu())
        dynamic = [cast_by_recipe(tensor, fmt, "current") for tensor, fmt in zip(tensors, FORMATS, strict=True)]
        self.compare("dynamic", exact, products(*dynamic))
        if self.scale is None:
            self.compare("sqnr", exact, products_by_recipe(*tensors, self.recipe))
            return
        scale = self.scale.to(x.device)
        casts = [cast(tensor, scale[slot], FORMATS[slot]) for slot, tensor in enumerate(tensors)]
        self.compare("sqnr", exact, products(*casts))
        aligned = [
            cast(tensor, aligned_scale(tensor, own, fmt), fmt)
            for tensor, own, fmt in zip(tensors, scale, FORMATS, strict=True)
        ]
        self.compare("aligned", exact, products(*aligned))
        uncalibrated = cast(tensors[GRAD_OUTPUT], 1.0, E5M2)
        self.compare("forward_only", exact, {"weight_gradient": uncalibrated.t() @ casts[INPUT]})
        for slot, (tensor, fmt) in enumerate(zip(tensors, FORMATS, strict=True)):
            self.lost[0, slot] += int(tensor.count_nonzero() - casts[slot].count_nonzero()) / tensor.numel()
            self.lost[1, slot] += int((tensor.abs() > fmt.max / scale[slot]).sum()) / tensor.numel()

    def compare(self, key: str, exact: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
        own = self.sums.setdefault(key, {})
        for name, tensor in got.items():
            if name in exact:
                own[name] = own.get(name, 0) + squares(exact[name], tensor)

    def report(self) -> dict[str, Any]:
        nothing = [None] * len(FORMATS)
        found: dict[str, Any] = {"amax": self.amax.tolist()}
        found |= dict.fromkeys(("headroom", "underflow", "overflow"), nothing)
        if self.scale is not None:
            top = self.amax * self.scale.cpu()
            room = [fmt.max / float(value) if value else None for fmt, value in zip(FORMATS, top, strict=True)]
            found["headroom"] = [value and math.log2(value) for value in room]
            found["underflow"], found["overflow"] = (self.lost / self.batches).tolist()
        return found | {key: decibels(own) for key, own in self.sums.items()}


def aligned_scale(tensor: Tensor, calibrated: Tensor, fmt: Format) -> Tensor:
    """Dynamic scaling's, but for less than a power of two, so that both round the same values alike.

    Where a few values make up most of a product, how these happen to round outweighs what a scale is to be judged by:
    whether it keeps them all in range.
    """
    ratio = fmt.max / largest(tensor, fmt) / calibrated
    return calibrated * torch.exp2(torch.floor(torch.log2(torch.where(ratio.isfinite(), ratio, 1.0))))


def layer_figures(model: DiT, checkpoint: Checkpoint, batches: Sequence[CalibrationBatch]) -> list[dict[str, Any]]:
    """Of each linear of the checkpoint's plan that a gradient reaches."""
    plan, scales = checkpoint.plan, checkpoint.scales
    assert plan is not None
    inputs: dict[str, Tensor] = {}
    found: dict[str, LayerFigures] = {}

    def visit(name: str, slot: int, tensor: Tensor) -> None:
        if slot == INPUT:
            inputs[name] = tensor
        if slot == GRAD_OUTPUT:
            own = found.setdefault(name, LayerFigures(scales.get(f"{name}.scale"), plan.recipe))
            own.add(inputs.pop(name), model.get_submodule(name).weight.detach(), tensor)

    watch(model, plan.linears, batches, visit)
    return [{"name": name, **found[name].report()} for name in plan.linears if name in found]


def products(x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Tensor]:
    return {"input": x, "weight": weight, "output": x @ weight.t(), "weight_gradient": grad.t() @ x}


def products_by_recipe(x: Tensor, weight: Tensor, grad: Tensor, recipe: str) -> dict[str, Tensor]:
    """Each tensor is cast along what its product sums over: the weight gradient, over the rows."""
    found = products(cast_by_recipe(x, E4M3, recipe), cast_by_recipe(weight, E4M3, recipe), grad)
    by_column = [cast_by_recipe(tensor.t(), fmt, recipe) for tensor, fmt in ((grad, E5M2), (x, E4M3))]
    return found | {"weight_gradient": by_column[0] @ by_column[1].t()}


def quantized(model: DiT, plan: Plan, scales: State) -> DiT:
    """A model on the same weights whose linears run as the plan says; those of a stateless recipe are emulated."""
    copy = load_model(own_config(model.config), model.state_dict())
    if plan.recipe == STATEFUL:
        fp8.swap_linears(copy, plan)
        fp8.load_scale_state(copy, scales)
        return copy
    for name in plan.linears:
        linear = copy.get_submodule(name)
        linear.weight = nn.Parameter(cast_by_recipe(linear.weight.detach(), E4M3, plan.recipe))

        def forward(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            x = inputs[0]
            return (x + (cast_by_recipe(x.detach(), E4M3, plan.recipe) - x).detach(),)

        def backward(module: nn.Module, inputs: object, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda grad: cast_by_recipe(grad, E5M2, plan.recipe).to(grad))

        linear.register_forward_pre_hook(forward)
        linear.register_forward_hook(backward)
    return copy


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    name: str
    value: str
    limit: str
    passed: bool


def losses(start: DiT, after: DiT, copy: DiT, batches: Sequence[CalibrationBatch]) -> dict[str, float]:
    """Of stage 1 without a class where that is where it began; BF16 and FP8 leave all else to autocast."""
    seen = [without_class(start, batch) for batch in batches] if start.stage < after.stage else list(batches)
    return {
        f"stage {start.stage}, as given": mean_loss(start, seen),
        f"stage {after.stage}": mean_loss(after, seen),
        f"stage {after.stage}, BF16": mean_loss(after, seen, torch.bfloat16),
        f"stage {after.stage}, FP8": mean_loss(copy, seen, torch.bfloat16),
    }


def gradient_cosine(after: DiT, copy: DiT, linears: Sequence[str], batch: CalibrationBatch) -> float | None:
    """Of the weight gradients of a first step, FP8 against full precision; of some of the layers of a large model."""
    total = sum(after.get_submodule(name).weight.numel() for name in linears)
    chosen = linears[:: max(1, -(-total // GRADIENT_PARAMETERS))]
    gradients = []
    for model in (after, copy):
        model.requires_grad_(False)
        weights = [model.get_submodule(name).weight.requires_grad_() for name in chosen]
        with recomputed_blocks(model):
            found = torch.autograd.grad(batch_loss(model, batch, seed=0), weights)
        gradients.append(torch.cat([gradient.flatten().float() for gradient in found]))
    if not gradients[0].any():
        return None
    return torch.nn.functional.cosine_similarity(*gradients, dim=0).item()


def loss_gap(loss: Mapping[str, float]) -> float:
    """By how much FP8 raises the loss of BF16, relatively."""
    *_, bf16, in_fp8 = loss.values()
    return in_fp8 / bf16 - 1


def gate(layers: Sequence[Mapping[str, Any]], loss: Mapping[str, float]) -> list[Check]:
    """What has to hold, but for the bit-exactness of what was carried."""
    before, full, *_ = loss.values()
    checks = [share("loss, BF16 to FP8", loss_gap(loss), LOSS_GAP)]
    if len({name.split(",")[0] for name in loss}) > 1:
        change = share("loss, stage 1 without a class to stage 2", full / before - 1, STAGE_GAP)
        checks.insert(0, replace(change, passed=abs(full / before - 1) <= STAGE_GAP))  # either way, another model
    figures = [
        (layer["aligned"]["weight_gradient"], layer["sqnr"]["weight_gradient"])
        for layer in layers
        if "aligned" in layer
    ]
    gaps = [aligned - own for aligned, own in figures if aligned is not None and own is not None]
    if gaps:
        for name, value, limit in (
            ("weight gradients below dynamic scaling that rounds alike, mean", sum(gaps) / len(gaps), MEAN_DECIBELS),
            ("weight gradients below dynamic scaling that rounds alike, worst layer", max(gaps), WORST_DECIBELS),
        ):
            checks.append(Check(name=name, value=f"{value:.3f} dB", limit=f"{limit} dB", passed=value <= limit))
    return checks


def share(name: str, value: float, limit: float) -> Check:  # not a number passes nothing
    return Check(name=name, value=f"{value:+.3%}", limit=f"{limit:.2%}", passed=value <= limit)


def carried_check(source: Checkpoint, written: Checkpoint, fates: Mapping[str, str]) -> Check:
    """Whether every carried weight, average and moment has its source's bits; `written` is mapped from its files."""
    count, different = 0, []
    for field in ("model", "ema", "optimizer"):
        state = getattr(written, field)
        for key in state:
            name = key if key in fates else key.rpartition(".")[0]
            if fates.get(name) == "carried":
                count += 1
                if not torch.equal(getattr(source, field)[key], state[key]):
                    different.append(key)
    return Check(
        name="carried tensors with other bits than their source's",
        value=f"{len(different)} of {count}" + (f", such as {different[0]}" if different else ""),
        limit="0",
        passed=not different,
    )


def as_report(checks: Sequence[Check]) -> dict[str, Any]:
    return {"passed": all(check.passed for check in checks), "checks": [asdict(check) for check in checks]}
