"""Exponential moving average of the weights, sharded as they are."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def decay_at(step: int, decay: float) -> float:
    """Warm-up of the decay, so that the first steps are not an average over the initial weights."""
    return min(decay, (1 + step) / (10 + step))


class Ema:
    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.averages = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        parameters = [parameter for _, parameter in model.named_parameters()]
        torch._foreach_lerp_(list(self.averages.values()), parameters, 1 - decay_at(step, self.decay))

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """The model has the averages as its weights; afterwards, its own again."""
        reshard(model)
        own = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        set_weights(model, self.averages)
        try:
            yield
        finally:
            reshard(model)
            set_weights(model, own)


@torch.no_grad()
def set_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


def reshard(model: nn.Module) -> None:
    """Lets go what FSDP2 has gathered of weights that are about to change."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
