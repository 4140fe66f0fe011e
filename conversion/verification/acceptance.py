"""Proof of a conversion: what FP8 does to the loss and to the gradient on batches held out, and the gate."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conversion.batches import CalibrationBatch, without_class
from conversion.calibration.amax import batch_losses, in_bf16, mean_loss, passes, recomputed_blocks
from conversion.options import STATEFUL
from conversion.verification.quantization_error import cast_by_recipe
from pixart.checkpoint import directory as checkpoints
from pixart.checkpoint.directory import Checkpoint
from pixart.checkpoint.lazy_tensors import LazyTensors, State
from pixart.checkpoint.safetensors_stream import differing_tensors
from pixart.model.dit import DiT, load_model, public_config
from pixart.model.fp8 import linear as fp8
from pixart.model.fp8 import scaling
from pixart.model.fp8.ops import E4M3, E5M2
from pixart.model.fp8.plan import Plan

# What a conversion must reach to pass.
LOSS_GAP = 0.0025  # DeepSeek-V3 (arXiv 2412.19437), section 3.3: relative loss error of FP8 training against BF16
STAGE_GAP = 0.01
MEAN_DECIBELS, WORST_DECIBELS = 0.1, 0.5  # that calibrated weight gradients may lie below dynamic scaling's


def quantized(model: DiT, plan: Plan, scales: State) -> DiT:
    """A model on the same weights whose linears run as the plan says; those of a stateless recipe are emulated."""
    copy = load_model(public_config(model.config), model.state_dict(), model.adaLN1.weight.device)
    if plan.recipe == STATEFUL:
        fp8.swap_linears(copy, plan)
        scaling.load_scale_state(copy, scales)
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


def loss_before(start: Checkpoint, batches: Sequence[CalibrationBatch], device: str) -> float:
    """Stage 1's, without a class, in BF16."""
    before = load_model(start.config, start.model, device)
    return mean_loss(before, [without_class(before, batch) for batch in batches])


def in_fp8(copy: DiT, batches: Sequence[CalibrationBatch], sampled: Sequence[str]) -> tuple[float, dict[str, Tensor]]:
    """The loss with all else in BF16, and the gradients over the first pass of the weights of the linears named."""
    copy.requires_grad_(False)
    weights = {name: copy.get_submodule(name).weight.requires_grad_() for name in sampled}
    first, *others = passes(copy, dict(enumerate(batches)))
    with recomputed_blocks(copy):
        with in_bf16(copy):
            found = batch_losses(copy, first)
        gradients = torch.autograd.grad(found.sum(), list(weights.values())) if weights else ()
    with torch.no_grad(), in_bf16(copy):
        found = torch.cat([found.detach(), *(batch_losses(copy, own) for own in others)])
    return float(found.mean()), dict(zip(weights, gradients, strict=True))


def gradient_cosine(exact: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> float | None:
    """Between the gradients of the same weights; none where there are none, or only zeros."""
    sums = torch.zeros(3, dtype=torch.float64)  # of products, of either's squares; float32 loses the sum of as many
    for name, gradient in got.items():
        pairs = ((exact[name], gradient), (exact[name], exact[name]), (gradient, gradient))
        sums += torch.stack([(a * b).sum(-1).double().sum() for a, b in pairs]).cpu()
    if sums[1] == 0:
        return None
    sizes = (sums[1] * sums[2]).sqrt()
    return float(sums[0] / sizes) if sizes else 0.0


def loss_gap(loss: Mapping[str, float]) -> float:
    """By how much FP8 raises the loss of BF16, relatively."""
    *_, bf16, in_fp8 = loss.values()
    return in_fp8 / bf16 - 1


def gate(layers: Sequence[Mapping[str, Any]], loss: Mapping[str, float]) -> list[Check]:
    """What has to hold, but for the bit-exactness of what was carried."""
    checks = [share("loss, BF16 to FP8", loss_gap(loss), LOSS_GAP)]
    before, after, *more = loss.values()
    if more:
        change = share("loss, stage 1 without a class to stage 2", after / before - 1, STAGE_GAP)
        checks.insert(0, replace(change, passed=abs(after / before - 1) <= STAGE_GAP))  # either way, another model
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


def carried_check(source: Checkpoint, written: Path, fates: Mapping[str, str]) -> Check:
    """Whether every carried weight, average and moment has its source's bits in the directory's files."""
    count, different = 0, []
    for field, file in checkpoints.STATE_FILES.items():
        state: State = getattr(source, field)
        carried = [key for key in state if fates.get(key if key in fates else key.rpartition(".")[0]) == "carried"]
        count += len(carried)
        different += differing_tensors(
            written / file, LazyTensors({key: partial(state.__getitem__, key) for key in carried})
        )
    return Check(
        name="carried tensors with other bits than their source's",
        value=f"{len(different)} of {count}" + (f", such as {different[0]}" if different else ""),
        limit="0",
        passed=not different,
    )


def as_report(checks: Sequence[Check]) -> dict[str, Any]:
    return {"passed": all(check.passed for check in checks), "checks": [asdict(check) for check in checks]}
