"""AdamW with two parameter groups, its learning rate schedule, and its state by parameter name."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pixart.config.training import TrainConfig
from pixart.model.dit import parameter_groups

MOMENTS = ("exp_avg", "exp_avg_sq")
PARAMETER_TENSORS = ("weight", "grad", *MOMENTS, "step", "ema")  # of one parameter, in `adamw_ema_update`


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of a step, which counts from 0.

    Linear warm-up, then a cosine from `lr` to `min_lr_ratio * lr` at the last step.
    """
    warmup = min(1.0, (step + 1) / max(config.warmup_steps, 1))
    progress = min(max(step - config.warmup_steps, 0) / max(config.steps - config.warmup_steps, 1), 1.0)
    return (
        config.lr * warmup * (config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2)
    )


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Return fused AdamW with its state allocated.

    Biases, normalizations and embeddings have no weight decay; `config.decay_qk_norm` adds it to the norms of queries
    and keys.
    """
    parameters = dict(model.named_parameters())
    decayed, undecayed = parameter_groups(model, decay_qk_norm=config.decay_qk_norm)
    groups = [
        {"params": [parameters[name] for name in decayed], "weight_decay": config.weight_decay},
        {"params": [parameters[name] for name in undecayed], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    for parameter in parameters.values():
        moments = {moment: torch.zeros_like(parameter) for moment in MOMENTS}
        optimizer.state[parameter] = {"step": torch.zeros((), device=parameter.device), **moments}
    return optimizer


def clip_gradients(model: nn.Module, max_norm: float | None) -> Tensor:
    """Return the global norm () of a sharded model's gradients, after clipping them to `max_norm` unless it is None."""
    if max_norm is not None:
        return cast(DTensor, torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)).full_tensor()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return cast(DTensor, torch.nn.utils.get_total_norm(gradients)).full_tensor()


def optimizer_tensors(optimizer: torch.optim.AdamW, model: nn.Module) -> dict[str, Tensor]:
    """Return NAME.exp_avg, NAME.exp_avg_sq and NAME.step of each parameter, sharded like the parameter."""
    return {
        f"{name}.{key}": optimizer.state[parameter][key]
        for name, parameter in model.named_parameters()
        for key in (*MOMENTS, "step")
    }


def adamw_ema_update(
    parameters: Sequence[Sequence[Tensor]],
    weight_decays: Sequence[float],
    lr: Tensor,
    ema_weight: Tensor,
    skip: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """Update weights with AdamW (arXiv 1711.05101, algorithm 2, as torch implements it), then the EMA, in place.

    `parameters` has the PARAMETER_TENSORS of each parameter; `ema_weight` () is one minus the EMA's decay; where `skip`
    () is true, weights, moments and steps do not change.
    """
    for (weight, grad, exp_avg, exp_avg_sq, step, ema), weight_decay in zip(parameters, weight_decays, strict=True):
        step.add_(~skip)
        new_exp_avg = torch.where(skip, exp_avg, exp_avg.lerp(grad, 1 - beta1))
        new_exp_avg_sq = torch.where(skip, exp_avg_sq, beta2 * exp_avg_sq + (1 - beta2) * grad.square())
        denominator = new_exp_avg_sq.sqrt() / (1 - beta2**step).sqrt() + eps
        updated = weight * (1 - lr * weight_decay) - lr / (1 - beta1**step) * new_exp_avg / denominator
        new_weight = torch.where(skip, weight, updated)
        exp_avg.copy_(new_exp_avg)
        exp_avg_sq.copy_(new_exp_avg_sq)
        weight.copy_(new_weight)
        ema.lerp_(new_weight, ema_weight)
