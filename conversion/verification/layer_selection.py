"""Selection of linears that lose too much accuracy in FP8 and stay in BF16, for `--keep-bf16 auto`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from conversion.batches import CalibrationBatch
from conversion.calibration.amax import mean_loss
from conversion.verification.acceptance import MAX_FP8_LOSS_INCREASE, quantized_copy
from pixart.checkpoint.directory import Checkpoint
from pixart.model.dit import DiT

MIN_OUTPUT_SQNR_DB = 15.0  # below it, outliers of the output exceed the range of FP8
NUM_BATCHES = 2  # for the effect of a single linear on the loss


def select_by_output(layers: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the linears whose output has too low an SQNR, with the reason."""
    output_sqnr = {layer["name"]: layer["sqnr_db"]["output"] for layer in layers}
    return {
        name: f"sensitive: SQNR of the output is {value:.1f} dB"
        for name, value in output_sqnr.items()
        if value is not None and value < MIN_OUTPUT_SQNR_DB
    }


def select_by_loss(checkpoint: Checkpoint, model: DiT, batches: Sequence[CalibrationBatch]) -> dict[str, str]:
    """Return the linears that increase the loss most, with the reason.

    They are the fewest linears without which the summed increase is below half of MAX_FP8_LOSS_INCREASE.
    """
    plan = checkpoint.plan
    assert plan is not None
    batches = batches[:NUM_BATCHES]
    bf16_loss = mean_loss(model, batches)
    increase = {}
    for name in plan.linears:
        single = restrict_plan(checkpoint, (name,))
        assert single.plan is not None
        increase[name] = mean_loss(quantized_copy(model, single.plan, single.scales), batches) / bf16_loss - 1
    selected: dict[str, str] = {}
    remaining = sum(increase.values())
    for name in sorted(increase, key=increase.__getitem__, reverse=True):
        if remaining <= MAX_FP8_LOSS_INCREASE / 2 or increase[name] <= 0:
            break
        selected[name] = f"sensitive: FP8 in this linear alone increases the loss by {increase[name]:.3%}"
        remaining -= increase[name]
    return selected


def restrict_plan(checkpoint: Checkpoint, linears: Sequence[str], kept: Mapping[str, str] | None = None) -> Checkpoint:
    """Return the checkpoint with only these linears in FP8; `kept` is added to the plan's reasons."""
    plan = checkpoint.plan
    assert plan is not None
    plan = dataclasses.replace(plan, linears=tuple(linears), kept={**plan.kept, **(kept or {})})
    scales = {key: checkpoint.scales[key] for key in checkpoint.scales if key.rpartition(".")[0] in plan.linears}
    return dataclasses.replace(checkpoint, plan=plan, scales=scales)


def keep_in_bf16(checkpoint: Checkpoint, kept: Mapping[str, str]) -> Checkpoint:
    """Return the checkpoint with the linears in `kept`, which maps names to reasons, moved to BF16."""
    assert checkpoint.plan is not None
    return restrict_plan(checkpoint, [name for name in checkpoint.plan.linears if name not in kept], kept)
