"""The arithmetic of AdamW and of the average of the weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")
COLUMNS = ("weight", "gradient", *MOMENTS, "step", "average")  # of a parameter


def advance(
    rows: Sequence[Sequence[Tensor]],
    decays: Sequence[float],
    rate: Tensor,
    share: Tensor,
    skip: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """AdamW (arXiv 1711.05101, algorithm 2), as torch has it, and the average; tensors of COLUMNS, in place."""
    for (weight, gradient, first, second, step, average), decay in zip(rows, decays, strict=True):
        step.add_(~skip)
        new_first = torch.where(skip, first, first.lerp(gradient, 1 - beta1))
        new_second = torch.where(skip, second, beta2 * second + (1 - beta2) * gradient.square())
        size = new_second.sqrt() / (1 - beta2**step).sqrt() + eps
        moved = weight * (1 - rate * decay) - rate / (1 - beta1**step) * new_first / size
        new_weight = torch.where(skip, weight, moved)
        first.copy_(new_first)
        second.copy_(new_second)
        weight.copy_(new_weight)
        average.lerp_(new_weight, share)
