"""FP8 linears with delayed scaling.

A tensor is cast as `round(x * scale)` with `scale = format.max / amax / 2**margin`, where amax is the largest
magnitude of the last steps ("FP8 formats for deep learning", arXiv 2209.05433). Input and weight are E4M3, the
gradient of the output is E5M2. On a GPU the GEMMs run on FP8 tensor cores; on a CPU they are emulated (see `ops`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pixart.model.fp8.ops import INPUT, SLOTS, WEIGHT, Float8LinearFunction, amax, concatenate, update_amax
from pixart.model.fp8.plan import Plan, iterate_planned_linears
from pixart.model.layers import fused_gemm


class Float8Linear(nn.Linear):
    """Linear whose GEMMs run in FP8; parameters and state-dict keys are those of the nn.Linear that it replaces.

    `scale` (3,) and `amax_history` (history, 3) are float32, by slot of SLOTS. Row 0 of the history is the staging row
    of the current step, rows 1 to the last are ordered from oldest to newest (TransformerEngine's layout).
    `saturation_rate` (3,) is a running mean of the share of steps in which the tensor had values beyond the range that
    its scale can represent.
    """

    scale: Tensor
    amax_history: Tensor
    saturation_rate: Tensor
    fp8_enabled = True  # False: the linear saturated in too many steps and runs as an nn.Linear
    high_precision_grad_weight = False  # compute the weight gradient in the input's precision
    gathered_weight: "GatheredWeight | None" = None  # set where FSDP2 gathers the weight in FP8

    @classmethod
    def from_linear(cls, linear: nn.Linear, plan: Plan) -> "Float8Linear":
        """Return an FP8 linear that shares the parameters of `linear`; scales are 1 and histories empty."""
        with torch.device("meta"):
            module = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        module.weight, module.bias = linear.weight, linear.bias
        device = linear.weight.device
        module.register_buffer("scale", torch.ones(len(SLOTS), device=device), persistent=False)
        history = torch.zeros(plan.history, len(SLOTS), device=device)
        module.register_buffer("amax_history", history, persistent=False)
        module.register_buffer("saturation_rate", torch.zeros(len(SLOTS), device=device), persistent=False)
        return module

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if not self.fp8_enabled:
            return super().forward(x)
        return gemm([self], x)[0]

    @staticmethod
    def fused_forward(linears: "Sequence[Float8Linear]", x: Tensor) -> Sequence[Tensor]:
        """Return the outputs of several linears for the same x, computed by one GEMM if all or none run in FP8."""
        if not any(isinstance(linear, Float8Linear) and linear.fp8_enabled for linear in linears):
            return fused_gemm(linears, x)
        if not all(isinstance(linear, Float8Linear) and linear.fp8_enabled for linear in linears):
            return [linear(x) for linear in linears]
        return gemm(linears, x)


@dataclass(kw_only=True, slots=True)
class GatheredWeight:
    """State of a weight that FSDP2 gathers in FP8."""

    grad_proxy: Tensor  # tensor without memory in place of the weight, which receives its gradient
    amax: Tensor  # (), of this rank's shard


def gemm(linears: Sequence[Float8Linear], x: Tensor) -> list[Tensor]:
    """Return each linear's output (..., out) for x (..., in), computed by one GEMM.

    The amax of the input and of the weights is staged if gradients are enabled.
    """
    if torch.is_grad_enabled():
        input_amax = amax(x)
        for linear in linears:
            update_amax(linear.amax_history[0], INPUT, input_amax)
            weight_amax = linear.gathered_weight.amax if linear.gathered_weight else amax(linear.weight)
            update_amax(linear.amax_history[0], WEIGHT, weight_amax)
    weights = [linear.gathered_weight.grad_proxy if linear.gathered_weight else linear.weight for linear in linears]
    outputs = Float8LinearFunction.apply(
        x.flatten(0, -2),
        concatenate(weights),
        concatenate([linear.weight.detach() for linear in linears]) if linears[0].gathered_weight else None,
        None if linears[0].bias is None else concatenate([linear.bias for linear in linears]),
        torch.stack([linear.scale for linear in linears]),  # a copy: scales may be updated before the backward pass
        tuple(linear.out_features for linear in linears),
        linears[0].high_precision_grad_weight,
        *[linear.amax_history[0] for linear in linears],
    )
    return [rows.unflatten(0, x.shape[:-1]) for rows in outputs]


def swap_linears(model: nn.Module, plan: Plan, *, high_precision_grad_weight: bool = False) -> None:
    """Replace each planned linear with a Float8Linear in place; parameters are shared, state-dict keys do not change.

    `high_precision_grad_weight` computes weight gradients in the input's precision.
    Raises ValueError for a name that is not a linear of the model.
    """
    for parent, child, linear in iterate_planned_linears(model, plan):
        swapped = Float8Linear.from_linear(linear, plan)
        swapped.high_precision_grad_weight = high_precision_grad_weight
        setattr(parent, child, swapped)


def float8_linears(model: nn.Module) -> Iterator[tuple[str, Float8Linear]]:
    """Iterate over the linears that run in FP8 by module name; those that have fallen back to BF16 are left out."""
    return (
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, Float8Linear) and module.fp8_enabled
    )
