"""FP8 linears of torchao: scales are measured anew in each step, so a checkpoint has none to keep."""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from pixart.model.fp8.plan import Plan

RECIPES = {"current": "tensorwise", "rowwise": "rowwise"}  # torchao's names


def swap_linears(model: nn.Module, plan: Plan) -> None:
    """Replaces each linear that the plan names, in place; emulated where there is no GPU.

    Raises ValueError where torchao is not installed, or the plan names what is no linear of the model.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ModuleNotFoundError:
        raise ValueError("FP8 by torchao: it is not installed; install the extra `torchao`") from None
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if unknown := set(plan.linears) - linears:
        raise ValueError(f"FP8 plan names {min(unknown)!r}, which is no linear of this model")
    config = replace(Float8LinearConfig.from_recipe_name(RECIPES[plan.recipe]), emulate=not torch.cuda.is_available())
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name in plan.linears)
    for name in plan.linears:
        linear = model.get_submodule(name)
        linear.forward = functools.partial(by_rows, linear.forward)


def by_rows(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """(..., in) -> (..., out) through rows: a scale for each row does not outlast a change of shape."""
    return forward(x.flatten(0, -2).contiguous()).unflatten(0, x.shape[:-1])
