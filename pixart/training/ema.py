"""Exponential moving average (EMA) of the weights, sharded like the weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def ema_decay(step: int, decay: float) -> float:
    """Return the decay at a step, with a warm-up so that the initial weights do not dominate the first averages."""
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """EMA weights of a model, by parameter name."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the EMA weights towards the model's weights; `step` counts from 0."""
        parameters: list[Tensor] = [parameter for _, parameter in model.named_parameters()]
        torch._foreach_lerp_(list(self.weights.values()), parameters, 1 - ema_decay(step, self.decay))

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Replace the model's weights by the EMA weights inside the context."""
        reshard(model)
        original = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        set_weights(model, self.weights)
        try:
            yield
        finally:
            reshard(model)
            set_weights(model, original)


@torch.no_grad()
def set_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights, by parameter name, into a model."""
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


def reshard(model: nn.Module) -> None:
    """Free the weights that FSDP2 has gathered, as they are about to change."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
