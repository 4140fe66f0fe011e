"""AdamW with two parameter groups, its learning rate, and its state by parameter name."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pixart.config.training import TrainConfig
from pixart.model.dit import parameter_groups

MOMENTS = ("exp_avg", "exp_avg_sq")
COLUMNS = ("weight", "gradient", *MOMENTS, "step", "average")  # of a parameter


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then cosine from `lr` to `min_lr_ratio * lr` at the last step; `step` counts from 0."""
    warm = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    progress = min(max(step - config.warmup_steps, 0) / max(config.steps - config.warmup_steps, 1), 1.0)
    return config.lr * warm * (config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Weight decay on weights only: not on biases, normalizations and embeddings. Moments are there, and zero."""
    parameters = dict(model.named_parameters())
    decayed, undecayed = parameter_groups(model)
    groups = [
        {"params": [parameters[name] for name in decayed], "weight_decay": config.weight_decay},
        {"params": [parameters[name] for name in undecayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    for parameter in parameters.values():
        moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    return optimizer


def optimizer_tensors(optimizer: torch.optim.AdamW, model: nn.Module) -> dict[str, Tensor]:
    """NAME.exp_avg, NAME.exp_avg_sq and NAME.step of each parameter, sharded as it is."""
    return {
        f"{name}.{key}": optimizer.state[parameter][key]
        for name, parameter in model.named_parameters()
        for key in (*MOMENTS, "step")
    }


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
