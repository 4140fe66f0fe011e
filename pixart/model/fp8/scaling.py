"""Delayed scaling: scales that follow the largest magnitudes of the last steps, and their state in a checkpoint."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pixart.model.fp8.linear import Float8Linear, float8_linears
from pixart.model.fp8.ops import FORMATS, GRAD_OUTPUT, SLOTS
from pixart.model.fp8.plan import Plan, fused_linears

SATURATION_WEIGHT = 1 / 32  # of a step in the running saturation rate
MAX_SATURATION_RATE = 0.5  # above this rate delayed scaling does not follow a tensor
# Buffers of a Float8Linear, and their names in a checkpoint, which stay those of the first checkpoints.
STORED_NAMES = {"scale": "scale", "amax_history": "amax_history", "saturation_rate": "overflow_share"}


def scale_from_amax(amax: Tensor, previous: Tensor, format_max: Tensor | float, margin: int = 0) -> Tensor:
    """Return format_max / amax / 2**margin in float32, or `previous` where amax is 0, infinite or NaN."""
    scale = format_max / amax.float() / 2.0**margin
    usable = torch.isfinite(amax) & (amax > 0) & torch.isfinite(scale)
    return torch.where(usable, scale, previous)


@functools.cache
def format_maxima(device: torch.device) -> Tensor:
    """Return the largest value of each slot's format (3,); cached, as a copy to a GPU synchronizes."""
    return torch.tensor([fmt.max for fmt in FORMATS], device=device)


@functools.cache
def fused_members(names: tuple[str, ...], device: torch.device) -> Tensor:
    """Return the indices of the linears that share each linear's scales, itself included -> (linears, 3).

    The rows of smaller groups repeat an index. Cached, as a copy to a GPU synchronizes.
    """
    indices = {name: index for index, name in enumerate(names)}
    members = {name: [index] * 3 for name, index in indices.items()}
    for group in fused_linears(names):
        members |= {name: [indices[group[min(place, len(group) - 1)]] for place in range(3)] for name in group}
    return torch.tensor(list(members.values()), device=device)


def share_scales(scales: Tensor, names: Sequence[str]) -> Tensor:
    """Return `scales` (linears, 3) with the smallest scale of the linears that one GEMM computes for each of these.

    The smallest scale, of the largest amax, clips none of their tensors. A GEMM of several linears has one scale for
    each operand: other scales would have to be divided out of its result in passes of their own.
    """
    return scales[fused_members(tuple(names), scales.device)].amin(1)


@torch.no_grad()
def update_scales(model: nn.Module, plan: Plan) -> None:
    """Append the staged amax, reduced over ranks, to the histories and set the scales from their maximum.

    Call once per optimizer step. An amax that is not finite, from a step that the optimizer skips, is replaced by the
    last one.
    """
    named = dict(float8_linears(model))
    linears = list(named.values())
    if not linears:
        return
    histories = torch.stack([module.amax_history for module in linears])  # (linears, history, 3)
    staged = histories[:, 0].contiguous()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(staged, op=dist.ReduceOp.MAX)
    histories[:, 0] = torch.where(staged.isfinite(), staged, histories[:, -1])
    format_max = format_maxima(histories.device)
    previous = torch.stack([module.scale for module in linears])
    saturated = (histories[:, 0] * previous > format_max).float()
    rates = torch.stack([module.saturation_rate for module in linears]).lerp_(saturated, SATURATION_WEIGHT)
    scales = share_scales(scale_from_amax(histories.amax(dim=1), previous, format_max, plan.margin), list(named))
    histories = histories.roll(-1, dims=1)
    histories[:, 0] = 0
    torch._foreach_copy_([module.scale for module in linears], list(scales))
    torch._foreach_copy_([module.amax_history for module in linears], list(histories))
    torch._foreach_copy_([module.saturation_rate for module in linears], list(rates))


@torch.no_grad()
def fp8_metrics(model: nn.Module) -> dict[str, dict[str, float]]:
    """Return `scale`, `headroom` and `saturation_rate`, each by linear and slot ("NAME.input" and so on).

    Headroom is in powers of two: how many times the last amax may double before it saturates; 0 for a tensor that no
    step has measured.
    """
    linears = dict(float8_linears(model))
    if not linears:
        return {}
    scales = torch.stack([module.scale for module in linears.values()])
    newest = torch.stack([module.amax_history[-1] for module in linears.values()])
    rates = torch.stack([module.saturation_rate for module in linears.values()])
    format_max = format_maxima(scales.device)
    headroom = torch.where(newest > 0, (format_max / (newest * scales)).log2(), 0.0)
    keys = [f"{name}.{slot}" for name in linears for slot in SLOTS]
    metrics = {"scale": scales, "headroom": headroom, "saturation_rate": rates}
    return {metric: dict(zip(keys, values.flatten().tolist(), strict=True)) for metric, values in metrics.items()}


def fall_back_to_bf16(model: nn.Module, plan: Plan, step: int) -> Plan:
    """Disable FP8 in linears that saturate in too many steps, in place, and return the plan without them.

    Delayed scaling assumes that a tensor's range changes slowly; where this fails in most steps, most steps are
    clipped. The same plan is returned if no linear falls back.
    """
    rates = {name: module.saturation_rate.max() for name, module in float8_linears(model)}
    if not rates:
        return plan
    values = torch.stack(list(rates.values())).tolist()
    reasons = {
        name: f"saturated in {rate:.0%} of the steps before step {step}"
        for name, rate in zip(rates, values, strict=True)
        if rate > MAX_SATURATION_RATE
    }
    return disable_fp8(model, plan, reasons)


def disable_fp8(model: nn.Module, plan: Plan, reasons: Mapping[str, str]) -> Plan:
    """Disable FP8 in the linears that `reasons` names, in place, and return the plan without them."""
    for name in reasons:
        linear = cast(Float8Linear, model.get_submodule(name))
        linear.fp8_enabled, linear.gathered_weight = False, None
    remaining = tuple(name for name in plan.linears if name not in reasons)
    return replace(plan, linears=remaining, kept={**plan.kept, **reasons}) if reasons else plan


def calibrated_state(amax: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """Return the `scale_state` of a model whose linears have the calibrated `amax[name]` (3,), by slot.

    All rows of a history but the staging row hold the calibrated amax. Where it is zero, the scale is 1 until a step
    has measured the tensor.
    """
    format_max = format_maxima(torch.device("cpu"))
    state: dict[str, Tensor] = {}
    if not plan.linears:
        return state
    measured = torch.stack([amax[name].float() for name in plan.linears])
    scales = share_scales(scale_from_amax(measured, torch.ones(len(SLOTS)), format_max, plan.margin), plan.linears)
    for name, scale in zip(plan.linears, scales, strict=True):
        history = torch.zeros(plan.history, len(SLOTS))
        history[1:] = amax[name]
        buffers = {
            "scale": scale.clone(),
            "amax_history": history,
            "saturation_rate": torch.zeros(len(SLOTS)),
        }
        state |= {f"{name}.{STORED_NAMES[buffer]}": tensor for buffer, tensor in buffers.items()}
    return state


@torch.no_grad()
def rescale_gradients(model: nn.Module, factor: float) -> None:
    """Adapt the scales to gradients that are `factor` times as large, as after a change of the batch size."""
    for _, module in float8_linears(model):
        measured = module.amax_history[:, GRAD_OUTPUT].any()
        module.amax_history[:, GRAD_OUTPUT] *= factor
        module.scale[GRAD_OUTPUT] /= torch.where(measured, factor, 1.0)


def scale_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of all FP8 linears, not copies, by their names in a checkpoint, such as NAME.amax_history."""
    return {
        f"{name}.{stored}": getattr(module, buffer)
        for name, module in float8_linears(model)
        for buffer, stored in STORED_NAMES.items()
    }


def scale_state(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of `scale_tensors` on the CPU."""
    return {name: tensor.cpu().clone() for name, tensor in scale_tensors(model).items()}


@torch.no_grad()
def load_scale_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy a `scale_state` into the model. Raises ValueError unless names and shapes match the model's exactly."""
    expected = scale_tensors(model)
    wrong_shape = {key for key in expected.keys() & state.keys() if expected[key].shape != state[key].shape}
    if mismatches := sorted(expected.keys() ^ state.keys() | wrong_shape):
        raise ValueError(
            f"FP8 scales: {len(mismatches)} tensors are missing, unknown or of another shape than the plan requires, "
            f"for example {mismatches[0]}; convert the checkpoint again"
        )
    for name, tensor in expected.items():
        tensor.copy_(state[name])
    share_loaded_scales(model)


@torch.no_grad()
def share_loaded_scales(model: nn.Module) -> None:
    """Share the scales of linears that one GEMM computes, in place; those of older checkpoints differ.

    The scales of a checkpoint of this version do not change.
    """
    if named := dict(float8_linears(model)):
        scales = torch.stack([module.scale for module in named.values()])
        torch._foreach_copy_([module.scale for module in named.values()], list(share_scales(scales, list(named))))
