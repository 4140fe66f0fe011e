"""Scales that follow the largest magnitudes of the last steps, and what a checkpoint keeps of them."""

import functools
from collections.abc import Mapping
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pixart.model.fp8.linear import float8_linears
from pixart.model.fp8.ops import (
    FORMATS,
    GRAD_OUTPUT,
    SLOTS,
)
from pixart.model.fp8.plan import Plan

OVERFLOW_WEIGHT = 1 / 32  # of a step in the running share of steps that overflow
OVERFLOW_LIMIT = 0.5  # a share above which delayed scaling does not follow a tensor


def scale_from_amax(amax: Tensor, previous: Tensor, format_max: Tensor | float, margin: int = 0) -> Tensor:
    """format_max / amax / 2**margin in float32; where amax is 0, infinite or not a number, the previous scale."""
    scale = format_max / amax.float() / 2.0**margin
    usable = torch.isfinite(amax) & (amax > 0) & torch.isfinite(scale)
    return torch.where(usable, scale, previous)


@functools.cache
def format_maxima(device: torch.device) -> Tensor:  # by slot; copied to the device once: a copy waits for it
    return torch.tensor([fmt.max for fmt in FORMATS], device=device)


@torch.no_grad()
def update_scales(model: nn.Module, plan: Plan) -> None:
    """Ends a step: staged amax, reduced over ranks, joins the history, and the scales follow its maximum.

    Of a step with values that are not finite, which the optimizer leaves out, the last amax joins again.
    """
    linears = [module for _, module in float8_linears(model)]
    if not linears:
        return
    histories = torch.stack([module.amax_history for module in linears])  # (linears, history, 3)
    staged = histories[:, 0].contiguous()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(staged, op=dist.ReduceOp.MAX)
    histories[:, 0] = torch.where(staged.isfinite(), staged, histories[:, -1])
    format_max = format_maxima(histories.device)
    previous = torch.stack([module.scale for module in linears])
    over = (histories[:, 0] * previous > format_max).float()
    shares = torch.stack([module.overflow_share for module in linears]).lerp_(over, OVERFLOW_WEIGHT)
    scales = scale_from_amax(histories.amax(dim=1), previous, format_max, plan.margin)
    histories = histories.roll(-1, dims=1)
    histories[:, 0] = 0
    torch._foreach_copy_([module.scale for module in linears], list(scales))
    torch._foreach_copy_([module.amax_history for module in linears], list(histories))
    torch._foreach_copy_([module.overflow_share for module in linears], list(shares))


@torch.no_grad()
def health(model: nn.Module) -> dict[str, dict[str, float]]:
    """`scale`, `headroom` and `overflow_share` by linear and slot, `NAME.input` and so on.

    Headroom is in powers of two: how many times the last amax may double before it overflows; 0 of a tensor that was
    not seen yet.
    """
    linears = dict(float8_linears(model))
    if not linears:
        return {}
    scales = torch.stack([module.scale for module in linears.values()])
    newest = torch.stack([module.amax_history[-1] for module in linears.values()])
    shares = torch.stack([module.overflow_share for module in linears.values()])
    format_max = format_maxima(scales.device)
    headroom = torch.where(newest > 0, (format_max / (newest * scales)).log2(), 0.0)
    keys = [f"{name}.{slot}" for name in linears for slot in SLOTS]
    measures = {"scale": scales, "headroom": headroom, "overflow_share": shares}
    return {what: dict(zip(keys, values.flatten().tolist(), strict=True)) for what, values in measures.items()}


def fall_back(model: nn.Module, plan: Plan, step: int) -> Plan:
    """Takes linears that keep overflowing out of FP8, in place -> the plan without them, or the same one.

    Delayed scaling trusts that a tensor is like it was: where that does not hold in most steps, it clips most steps.
    """
    shares = {name: module.overflow_share.max() for name, module in float8_linears(model)}
    if not shares:
        return plan
    found = torch.stack(list(shares.values())).tolist()
    reasons = {
        name: f"overflowed in {share:.0%} of the steps before step {step}"
        for name, share in zip(shares, found, strict=True)
        if share > OVERFLOW_LIMIT
    }
    for name in reasons:
        linear = model.get_submodule(name)
        linear.in_fp8, linear.gathered = False, None
    left = tuple(name for name in plan.linears if name not in reasons)
    return replace(plan, linears=left, kept={**plan.kept, **reasons}) if reasons else plan


def calibrated_state(amax: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """The `scale_state` of a model whose linears have measured `amax[name]` (3,), in every row but the staging one.

    A zero leaves a slot's scale at 1 until a step has seen its tensor.
    """
    format_max = format_maxima(torch.device("cpu"))
    state = {}
    for name in plan.linears:
        history = torch.zeros(plan.history, len(SLOTS))
        history[1:] = amax[name]
        state[f"{name}.scale"] = scale_from_amax(amax[name], torch.ones(len(SLOTS)), format_max, plan.margin)
        state[f"{name}.amax_history"] = history
        state[f"{name}.overflow_share"] = torch.zeros(len(SLOTS))
    return state


@torch.no_grad()
def rescale_gradients(model: nn.Module, factor: float) -> None:
    """Follows a change of the batch: gradients, and so their amax, become `factor` times as large."""
    for _, module in float8_linears(model):
        measured = module.amax_history[:, GRAD_OUTPUT].any()
        module.amax_history[:, GRAD_OUTPUT] *= factor
        module.scale[GRAD_OUTPUT] /= torch.where(measured, factor, 1.0)


def scale_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors themselves, by module name: NAME.scale, NAME.amax_history and NAME.overflow_share."""
    return {
        f"{name}.{buffer}": getattr(module, buffer)
        for name, module in float8_linears(model)
        for buffer in ("scale", "amax_history", "overflow_share")
    }


def scale_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of them on the CPU: what a checkpoint keeps."""
    return {name: tensor.cpu().clone() for name, tensor in scale_tensors(model).items()}


@torch.no_grad()
def load_scale_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts back what `scale_state` gave. Raises ValueError unless the names and shapes are just those of the model."""
    own = scale_tensors(model)
    wrong = {key for key in own.keys() & state.keys() if own[key].shape != state[key].shape}
    if odd := sorted(own.keys() ^ state.keys() | wrong):
        raise ValueError(
            f"FP8 scales do not fit the plan: {len(odd)} missing, unknown or of another shape, as {odd[0]}"
        )
    for name, tensor in own.items():
        tensor.copy_(state[name])
