"""AdamW with two parameter groups, its learning rate, and its state by parameter name."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pixart.config import TrainConfig
from pixart.model.dit import parameter_groups
from pixart.training.distributed import like, whole

MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up, then cosine from `lr` to `final_lr * lr` at the last step; `step` counts from 0."""
    warm = min(1.0, (step + 1) / max(config.warmup, 1))
    progress = min(max(step - config.warmup, 0) / max(config.steps - config.warmup, 1), 1.0)
    return config.lr * warm * (config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2)


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Weight decay on weights only: not on biases, normalizations and embeddings."""
    parameters = dict(model.named_parameters())
    decayed, undecayed = parameter_groups(model)
    groups = [
        {"params": [parameters[name] for name in decayed], "weight_decay": config.weight_decay},
        {"params": [parameters[name] for name in undecayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def optimizer_state(optimizer: torch.optim.AdamW, model: nn.Module) -> dict[str, Tensor]:
    """NAME.exp_avg, NAME.exp_avg_sq and NAME.step of each parameter, whole, on the CPU; every rank must call it."""
    state = {}
    for name, parameter in model.named_parameters():
        own = optimizer.state.get(parameter)
        for moment in MOMENTS:
            state[f"{name}.{moment}"] = whole(own[moment]) if own else torch.zeros(parameter.shape)
        state[f"{name}.step"] = own["step"].detach().cpu() if own else torch.zeros(())
    return state


def load_optimizer_state(optimizer: torch.optim.AdamW, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts back what `optimizer_state` gave. Raises ValueError for a parameter without moments of its shape."""
    for name, parameter in model.named_parameters():
        for moment in MOMENTS:
            found = state.get(f"{name}.{moment}")
            if found is None or found.shape != parameter.shape:
                raise ValueError(
                    f"optimizer state of {name}: {moment} is missing or not of shape {tuple(parameter.shape)}"
                )
        moments = {moment: like(state[f"{name}.{moment}"], parameter) for moment in MOMENTS}
        optimizer.state[parameter] = {"step": state[f"{name}.step"].float().to(parameter.device), **moments}
