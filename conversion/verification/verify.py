"""Verification of a converted checkpoint on validation batches, and `--keep-bf16 auto`, which follows from it."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from conversion.batches import CalibrationBatch
from conversion.options import AUTO, Options
from conversion.verification import acceptance, layer_selection, quantization_error
from pixart.checkpoint.directory import Checkpoint
from pixart.model.dit import DiT


def verify(
    start: Checkpoint, model: DiT, result: Checkpoint, batches: Sequence[CalibrationBatch], options: Options
) -> tuple[Checkpoint, list[dict[str, Any]], dict[str, float], float | None]:
    """Verify `result` on the validation batches, the last of `batches`.

    Returns the checkpoint, the statistics of each layer, the losses before and after, and the cosine similarity of the
    first step's weight gradients between FP8 and BF16. With `--keep-bf16 auto`, linears that lose too much accuracy are
    removed from the plan of the returned checkpoint.
    """
    validation, is_auto = batches[options.num_batches :], AUTO in options.keep_bf16
    observed = quantization_error.observe(model, result, validation)
    if is_auto:
        result = layer_selection.keep_in_bf16(result, layer_selection.select_by_output(observed.layers))
    bf16_losses = {f"stage {result.stage}, BF16": observed.loss}
    if start.stage < result.stage:
        bf16_losses = {"stage 1, BF16": acceptance.stage1_loss(start, validation, options.device), **bf16_losses}

    def measure_plan() -> tuple[dict[str, float], dict[str, Tensor]]:
        assert result.plan is not None
        sampled = [name for name in observed.grads if name in result.plan.linears]
        copy = acceptance.quantized_copy(model, result.plan, result.scales)
        fp8_loss, grads = acceptance.fp8_loss_and_grads(copy, validation, sampled)
        return {**bf16_losses, f"stage {result.stage}, FP8": fp8_loss}, grads

    losses, grads = measure_plan()
    if is_auto and not acceptance.fp8_loss_increase(losses) <= acceptance.MAX_FP8_LOSS_INCREASE:
        result = layer_selection.keep_in_bf16(result, layer_selection.select_by_loss(result, model, batches))
        losses, grads = measure_plan()
    assert result.plan is not None
    layers = [layer for layer in observed.layers if layer["name"] in result.plan.linears]
    return result, layers, losses, acceptance.gradient_cosine(observed.grads, grads)
