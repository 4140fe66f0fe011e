"""Acceptance checks of a conversion: losses, weight gradients and carried tensors, on validation batches."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from conversion.batches import CalibrationBatch, with_null_class
from conversion.calibration.amax import activation_checkpointing, batch_losses, bf16_autocast, mean_loss, split_passes
from conversion.options import STATEFUL
from conversion.stage2.reparameterize import CARRIED
from conversion.verification.quantization_error import fake_quantize_dynamic
from pixart.checkpoint import directory as checkpoints
from pixart.checkpoint.directory import Checkpoint
from pixart.checkpoint.lazy_tensors import LazyTensors, State
from pixart.checkpoint.safetensors_stream import differing_tensors
from pixart.model.dit import DiT, load_model, public_config
from pixart.model.fp8 import linear as fp8
from pixart.model.fp8 import scaling
from pixart.model.fp8.ops import E4M3, E5M2
from pixart.model.fp8.plan import Plan

# Limits of the acceptance checks.
MAX_FP8_LOSS_INCREASE = 0.0025  # DeepSeek-V3 (arXiv 2412.19437), section 3.3: relative loss error of FP8 training
MAX_STAGE2_LOSS_CHANGE = 0.01
MAX_MEAN_SQNR_LOSS_DB, MAX_WORST_SQNR_LOSS_DB = 0.1, 0.5  # of grad_weight, against dynamic scaling


def quantized_copy(model: DiT, plan: Plan, scales: State) -> DiT:
    """Return a model with the same weights whose planned linears run in FP8; dynamic recipes are emulated."""
    copy = load_model(public_config(model.config), model.state_dict(), model.adaLN1.weight.device)
    if plan.recipe == STATEFUL:
        fp8.swap_linears(copy, plan)
        scaling.load_scale_state(copy, scales)
        return copy
    for name in plan.linears:
        linear = copy.get_submodule(name)
        linear.weight = nn.Parameter(fake_quantize_dynamic(linear.weight.detach(), E4M3, plan.recipe))

        def quantize_input(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            x = inputs[0]
            return (x + (fake_quantize_dynamic(x.detach(), E4M3, plan.recipe) - x).detach(),)

        def quantize_grad(module: nn.Module, inputs: object, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(lambda grad: fake_quantize_dynamic(grad, E5M2, plan.recipe).to(grad))

        linear.register_forward_pre_hook(quantize_input)
        linear.register_forward_hook(quantize_grad)
    return copy


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """Result of an acceptance check; `value` and `limit` are formatted with their units."""

    name: str
    value: str
    limit: str
    passed: bool


def stage1_loss(start: Checkpoint, batches: Sequence[CalibrationBatch], device: str) -> float:
    """Return the loss of the stage-1 source with the null class, in BF16."""
    model = load_model(start.config, start.model, device)
    return mean_loss(model, [with_null_class(model, batch) for batch in batches])


def fp8_loss_and_grads(
    copy: DiT, batches: Sequence[CalibrationBatch], linears: Sequence[str]
) -> tuple[float, dict[str, Tensor]]:
    """Return the mean loss of a quantized copy, and grad_weight of `linears` over the first pass.

    Everything but the planned linears runs in BF16.
    """
    copy.requires_grad_(False)
    weights = {name: copy.get_submodule(name).weight.requires_grad_() for name in linears}
    first, *others = split_passes(copy, dict(enumerate(batches)))
    with activation_checkpointing(copy):
        with bf16_autocast(copy):
            losses = batch_losses(copy, first)
        grads = torch.autograd.grad(losses.sum(), list(weights.values())) if weights else ()
    with torch.no_grad(), bf16_autocast(copy):
        losses = torch.cat([losses.detach(), *(batch_losses(copy, group) for group in others)])
    return float(losses.mean()), dict(zip(weights, grads, strict=True))


def gradient_cosine(exact: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> float | None:
    """Return the cosine similarity of two gradients over the same weights; None if `exact` is zero or empty."""
    # Dot product and squared norms. A sum of this many terms loses accuracy in float32.
    sums = torch.zeros(3, dtype=torch.float64)
    for name, grad in actual.items():
        pairs = ((exact[name], grad), (exact[name], exact[name]), (grad, grad))
        sums += torch.stack([(a * b).sum(-1).double().sum() for a, b in pairs]).cpu()
    if sums[1] == 0:
        return None
    norms = (sums[1] * sums[2]).sqrt()
    return float(sums[0] / norms) if norms else 0.0


def fp8_loss_increase(losses: Mapping[str, float]) -> float:
    """Return the relative increase of the FP8 loss over the BF16 loss, the last two entries of `losses`."""
    *_, bf16, in_fp8 = losses.values()
    return in_fp8 / bf16 - 1


def check_losses_and_grads(layers: Sequence[Mapping[str, Any]], losses: Mapping[str, float]) -> list[Check]:
    """Run the acceptance checks on losses and on the SQNR of grad_weight.

    `losses` holds the losses of stage 1 (if the stage changed), of the result in BF16 and of the result in FP8, in this
    order; `layers` are those of `quantization_error.observe`.
    """
    checks = [relative_check("BF16 loss vs. FP8 loss", fp8_loss_increase(losses), MAX_FP8_LOSS_INCREASE)]
    before, after, *more = losses.values()
    if more:
        change = after / before - 1
        name = "Stage-1 loss (null class) vs. converted stage-2 loss"
        check = relative_check(name, change, MAX_STAGE2_LOSS_CHANGE)
        # A lower loss fails as well: it shows that stage 2 is not the model that stage 1 was.
        checks.insert(0, replace(check, passed=abs(change) <= MAX_STAGE2_LOSS_CHANGE))
    pairs = [
        (layer["aligned_dynamic_sqnr_db"]["grad_weight"], layer["sqnr_db"]["grad_weight"])
        for layer in layers
        if "aligned_dynamic_sqnr_db" in layer
    ]
    losses_db = [dynamic - actual for dynamic, actual in pairs if dynamic is not None and actual is not None]
    if losses_db:
        name = "grad_weight SQNR loss vs. dynamic scaling"
        for which, value, limit in (
            ("mean", sum(losses_db) / len(losses_db), MAX_MEAN_SQNR_LOSS_DB),
            ("worst layer", max(losses_db), MAX_WORST_SQNR_LOSS_DB),
        ):
            checks.append(
                Check(name=f"{name}, {which}", value=f"{value:.3f} dB", limit=f"{limit} dB", passed=value <= limit)
            )
    return checks


def relative_check(name: str, value: float, limit: float) -> Check:
    """Check that a relative change is at most `limit`; NaN fails."""
    return Check(name=name, value=f"{value:+.3%}", limit=f"{limit:.2%}", passed=value <= limit)


def check_carried_tensors(source: Checkpoint, written: Path, provenance: Mapping[str, str]) -> Check:
    """Check that every carried weight, EMA weight and moment in the written files is bit-identical to its source."""
    count, different = 0, []
    for group, file in checkpoints.STATE_FILES.items():
        state: State = getattr(source, group)
        carried = [
            key for key in state if provenance.get(key if key in provenance else key.rpartition(".")[0]) == CARRIED
        ]
        count += len(carried)
        different += differing_tensors(
            written / file, LazyTensors({key: partial(state.__getitem__, key) for key in carried})
        )
    return Check(
        name="Carried tensors that are not bit-identical to the source",
        value=f"{len(different)} of {count}" + (f", such as {different[0]}" if different else ""),
        limit="0",
        passed=not different,
    )


def as_report(checks: Sequence[Check]) -> dict[str, Any]:
    """Return the checks, and whether all of them passed, as JSON values."""
    return {"passed": all(check.passed for check in checks), "checks": [asdict(check) for check in checks]}
