"""Exponential moving average of the weights, sharded as they are."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pixart.training.distributed import like, whole


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

    def state(self) -> dict[str, Tensor]:
        """Whole tensors on the CPU; every rank must call it."""
        return {name: whole(average) for name, average in self.averages.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        self.averages = {name: like(state[name], average) for name, average in self.averages.items()}
