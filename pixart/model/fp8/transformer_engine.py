"""FP8 linears of TransformerEngine. Training takes the recipes of which a checkpoint keeps no scales.

Delayed scaling is there to be compared with: it does not compile, and its scales are lost with the process.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pixart.model.fp8.plan import Plan, planned

# TransformerEngine's names.
RECIPES = {"mxfp8": "MXFP8BlockScaling", "current": "Float8CurrentScaling", "delayed": "DelayedScaling"}


def swap_linears(model: nn.Module, plan: Plan) -> None:
    """Replaces each linear that the plan names, in place; parameters are shared, their names do not change.

    Raises ValueError where TransformerEngine is not installed, this machine has no hardware for the recipe, or the
    plan names what is no linear of the model.
    """
    if not torch.cuda.is_available():
        raise ValueError("FP8 by TransformerEngine: this machine has no GPU")
    try:
        import transformer_engine.pytorch as te
        from transformer_engine.common import recipe as recipes
    except ImportError as error:
        raise ValueError(f"FP8 by TransformerEngine: {error}; install the extra `transformer-engine`") from None
    able = te.is_mxfp8_available if plan.recipe == "mxfp8" else te.is_fp8_available
    there, why = able(return_reason=True)
    if not there:
        raise ValueError(f"FP8 by TransformerEngine, recipe {plan.recipe}: {why}")
    recipe = getattr(recipes, RECIPES[plan.recipe])()
    for parent, child, linear in planned(model, plan):
        swapped = te.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        swapped.weight, swapped.bias = linear.weight, linear.bias
        # Each linear alone: what is computed again on the way back is outside of the model's forward pass.
        swapped.forward = in_fp8(swapped.forward, te.autocast, recipe)
        setattr(parent, child, swapped)


def in_fp8(
    forward: Callable[[Tensor], Tensor], autocast: Callable[..., Any], recipe: Any
) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        with autocast(enabled=True, recipe=recipe):
            return forward(x)

    return run
