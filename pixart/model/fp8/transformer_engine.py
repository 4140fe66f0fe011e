"""FP8 linears of TransformerEngine. Training supports the recipes without scales in a checkpoint.

Delayed scaling is for comparison only: it does not compile, and its scales are lost when the process ends.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pixart.model.fp8.plan import Plan, iterate_planned_linears

# TransformerEngine's names.
RECIPES = {"mxfp8": "MXFP8BlockScaling", "current": "Float8CurrentScaling", "delayed": "DelayedScaling"}


def swap_linears(model: nn.Module, plan: Plan) -> None:
    """Replace each planned linear with TransformerEngine's in place; parameters are shared, their names do not change.

    Raises ValueError if TransformerEngine is not installed, the machine's GPU does not support the recipe, or the plan
    names a module that is not a linear of the model.
    """
    if not torch.cuda.is_available():
        raise ValueError("fp8_backend=te: this machine has no GPU; use the native backend or torchao")
    try:
        import transformer_engine.pytorch as te
        from transformer_engine.common import recipe as recipes
    except ImportError as error:
        raise ValueError(f"fp8_backend=te: {error}; install the extra `transformer-engine`") from None
    is_available = te.is_mxfp8_available if plan.recipe == "mxfp8" else te.is_fp8_available
    available, reason = is_available(return_reason=True)
    if not available:
        raise ValueError(f"fp8_backend=te: recipe {plan.recipe!r} is not supported: {reason}; use another backend")
    recipe = getattr(recipes, RECIPES[plan.recipe])()
    for parent, child, linear in iterate_planned_linears(model, plan):
        swapped = te.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        swapped.weight, swapped.bias = linear.weight, linear.bias
        # Each linear enters FP8 itself: activation recomputation runs outside of the model's forward pass.
        swapped.forward = with_autocast(swapped.forward, te.autocast, recipe)
        setattr(parent, child, swapped)


def with_autocast(
    forward: Callable[[Tensor], Tensor], autocast: Callable[..., Any], recipe: Any
) -> Callable[[Tensor], Tensor]:
    """Return `forward` wrapped in a separate FP8 autocast context."""

    def run(x: Tensor) -> Tensor:
        with autocast(enabled=True, recipe=recipe):
            return forward(x)

    return run
