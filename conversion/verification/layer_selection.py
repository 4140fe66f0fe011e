"""Which linears lose too much in FP8, as measured: they stay in BF16 where the plan is left to the conversion."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from conversion.batches import CalibrationBatch
from conversion.calibration.amax import mean_loss
from conversion.verification.acceptance import LOSS_GAP, quantized
from pixart.checkpoint.directory import Checkpoint
from pixart.model.dit import DiT

LEAST_DECIBELS = 15.0  # an output with less has outliers that FP8 cannot hold
BATCHES = 2  # that a linear's own effect on the loss is measured on


def by_output(layers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Linears whose output would have too low an SQNR, with the reason."""
    found = {layer["name"]: layer["sqnr"]["output"] for layer in layers}
    return {
        name: f"sensitive: its output would have {decibels:.1f} dB"
        for name, decibels in found.items()
        if decibels is not None and decibels < LEAST_DECIBELS
    }


def by_loss(checkpoint: Checkpoint, model: DiT, batches: Sequence[CalibrationBatch]) -> dict[str, str]:
    """The linears that raise the loss most, as many as bring the sum of all below half of LOSS_GAP, with the reason."""
    plan = checkpoint.plan
    assert plan is not None
    batches = batches[:BATCHES]
    base = mean_loss(model, batches)
    change = {}
    for name in plan.linears:
        alone = only(checkpoint, (name,))
        assert alone.plan is not None
        change[name] = mean_loss(quantized(model, alone.plan, alone.scales), batches) / base - 1
    found: dict[str, str] = {}
    left = sum(change.values())
    for name in sorted(change, key=change.__getitem__, reverse=True):
        if left <= LOSS_GAP / 2 or change[name] <= 0:
            break
        found[name] = f"sensitive: alone it raises the loss by {change[name]:.3%}"
        left -= change[name]
    return found


def only(checkpoint: Checkpoint, linears: Sequence[str], kept: Mapping[str, str] | None = None) -> Checkpoint:
    """With these linears in FP8, and no others; `kept` joins the plan's reasons."""
    plan = checkpoint.plan
    assert plan is not None
    plan = dataclasses.replace(plan, linears=tuple(linears), kept={**plan.kept, **(kept or {})})
    scales = {key: checkpoint.scales[key] for key in checkpoint.scales if key.rpartition(".")[0] in plan.linears}
    return dataclasses.replace(checkpoint, plan=plan, scales=scales)


def without(checkpoint: Checkpoint, kept: Mapping[str, str]) -> Checkpoint:
    """With the linears that `kept` names, and why, in BF16."""
    assert checkpoint.plan is not None
    return only(checkpoint, [name for name in checkpoint.plan.linears if name not in kept], kept)
