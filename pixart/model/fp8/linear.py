"""FP8 linears with delayed scaling.

A tensor is cast as `round(x * scale)` with `scale = format.max / amax / 2**margin`, where amax is the largest
magnitude of the last steps ("FP8 formats for deep learning", arXiv 2209.05433). Input and weight are E4M3, the
gradient of the output is E5M2. On a GPU the products run on FP8 tensor cores; on a CPU the values are rounded to
the same grid and multiplied in float32, which gives the same result up to the order of summation.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pixart.model.fp8.ops import (
    INPUT,
    SLOTS,
    WEIGHT,
    Float8Product,
    largest,
    record,
)
from pixart.model.fp8.plan import Plan, planned


class Float8Linear(nn.Linear):
    """A linear whose products run in FP8; parameters and state-dict keys are those of the nn.Linear it replaces.

    `scale` (3,) and `amax_history` (history, 3) are float32, by slot of SLOTS. Row 0 of the history is staged by the
    current step, rows 1 to the last run from oldest to newest (TransformerEngine's layout). `overflow_share` (3,) is
    a running mean: in which share of the steps the tensor had values that its scale does not let through.
    """

    scale: Tensor
    amax_history: Tensor
    overflow_share: Tensor
    in_fp8 = True  # a linear that keeps overflowing goes on without
    fine_weight_gradient = False  # whether the weight's gradient is a product in the input's own precision
    gathered: "Gathered | None" = None  # where the weight comes in FP8

    @classmethod
    def from_linear(cls, linear: nn.Linear, plan: Plan) -> "Float8Linear":
        with torch.device("meta"):
            module = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        module.weight, module.bias = linear.weight, linear.bias
        device = linear.weight.device
        module.register_buffer("scale", torch.ones(len(SLOTS), device=device), persistent=False)
        history = torch.zeros(plan.history, len(SLOTS), device=device)
        module.register_buffer("amax_history", history, persistent=False)
        module.register_buffer("overflow_share", torch.zeros(len(SLOTS), device=device), persistent=False)
        return module

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if not self.in_fp8:
            return super().forward(x)
        return product([self], x)

    @staticmethod
    def side_by_side(linears: "Sequence[Float8Linear]", x: Tensor) -> Sequence[Tensor]:
        """What each of several linears makes of the same x, as one product; all are in FP8 or all come one by one."""
        if not all(isinstance(linear, Float8Linear) and linear.in_fp8 for linear in linears):
            return [linear(x) for linear in linears]
        return product(linears, x).split([linear.out_features for linear in linears], dim=-1)


@dataclass(kw_only=True, slots=True)
class Gathered:
    """A weight that comes in FP8: what its gradient goes to instead, and its amax."""

    gradient: Tensor
    amax: Tensor


def product(linears: Sequence[Float8Linear], x: Tensor) -> Tensor:
    """x (..., in) times the weights, one after the other -> (..., sum of outs); amax is staged where gradients are."""
    if torch.is_grad_enabled():
        seen = largest(x)
        for linear in linears:
            record(linear.amax_history[0], INPUT, seen)
            own = linear.gathered.amax if linear.gathered else largest(linear.weight)
            record(linear.amax_history[0], WEIGHT, own)
    weights = [linear.gathered.gradient if linear.gathered else linear.weight for linear in linears]
    rows = Float8Product.apply(
        x.flatten(0, -2),
        joined(weights),
        joined([linear.weight.detach() for linear in linears]) if linears[0].gathered else None,
        None if linears[0].bias is None else joined([linear.bias for linear in linears]),
        torch.stack([linear.scale for linear in linears]),  # a copy: the way back may see those of the next step
        tuple(linear.out_features for linear in linears),
        linears[0].fine_weight_gradient,
        *[linear.amax_history[0] for linear in linears],
    )
    return rows.unflatten(0, x.shape[:-1])


def joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def swap_linears(model: nn.Module, plan: Plan, *, fine_weight_gradient: bool = False) -> None:
    """Replaces each linear that the plan names, in place; parameters are shared, state-dict keys do not change.

    `fine_weight_gradient`: the weight's gradient is a product in the input's own precision.

    Raises ValueError for a name that is no linear of the model.
    """
    for parent, child, linear in planned(model, plan):
        swapped = Float8Linear.from_linear(linear, plan)
        swapped.fine_weight_gradient = fine_weight_gradient
        setattr(parent, child, swapped)


def float8_linears(model: nn.Module) -> Iterator[tuple[str, Float8Linear]]:
    return (
        (name, module) for name, module in model.named_modules() if isinstance(module, Float8Linear) and module.in_fp8
    )
