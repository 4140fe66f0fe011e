"""FP8 linears of torchao: dynamic scaling, so that a checkpoint has no scales."""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from pixart.model.fp8.plan import Plan

RECIPES = {"current": "tensorwise", "rowwise": "rowwise"}  # torchao's names


def swap_linears(model: nn.Module, plan: Plan) -> None:
    """Replace each planned linear with torchao's in place; FP8 is emulated without a GPU.

    Raises ValueError if torchao is not installed, or the plan names a module that is not a linear of the model.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ModuleNotFoundError:
        raise ValueError("fp8_backend=torchao: torchao is not installed; install the extra `torchao`") from None
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if unknown := set(plan.linears) - linears:
        raise ValueError(f"FP8 plan: {min(unknown)!r} is not a linear of this model; convert the checkpoint again")
    config = replace(Float8LinearConfig.from_recipe_name(RECIPES[plan.recipe]), emulate=not torch.cuda.is_available())
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name in plan.linears)
    for name in plan.linears:
        linear = model.get_submodule(name)
        linear.forward = functools.partial(forward_rows, linear.forward)


def forward_rows(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Call a linear on x (..., in) flattened to rows -> (..., out); row-wise scales do not survive a reshape."""
    return forward(x.flatten(0, -2).contiguous()).unflatten(0, x.shape[:-1])
