"""Distillation of stage 1 into a fitted modulation.

Trainable are the last layer of the shared MLP, the offsets E and, for the weights but not for their EMA, the scales s;
all other parameters are stage 1's and frozen. The loss is the mean squared difference between the velocities of both
models under the training distribution of t.
"""

from dataclasses import fields

import torch
from torch import Tensor

from conversion.stage2.modulation import (
    Modulation,
    block_modulations,
    null_condition,
    override_modulations,
    rescaled_modulations,
)
from pixart.model.dit import DiT
from pixart.model.rectified_flow import interpolate, stratified_time

STEPS = 300
LEARNING_RATE = 1e-3
SCALE_INDEX = (0, 0, 1, 1, 2, 3)  # index of each chunk's scale ratio: gamma and beta of one norm share theirs


def distill(stage1: DiT, initial: Modulation, latents: Tensor, *, train_scales: bool, steps: int = STEPS) -> Modulation:
    """Train `initial` to reproduce the velocities of `stage1` with the null class.

    `latents` (B, C, h, w) are normalized, on the model's device.
    """
    device, blocks = latents.device, len(initial.offsets)
    params = {
        name: getattr(initial, name).to(device).clone().requires_grad_() for name in ("weight", "bias", "offsets")
    }
    ratio = torch.zeros(blocks, 4, initial.offsets.shape[1] // 6, device=device, requires_grad=train_scales)
    initial_scales = initial.scales.to(device).view(blocks, 6, -1)
    stage1.requires_grad_(False)

    def current() -> Modulation:
        return Modulation(**params, scales=(initial_scales * (1 + ratio[:, SCALE_INDEX])).flatten(1))

    trainable = [*params.values(), *([ratio] if train_scales else [])]
    optimizer = torch.optim.Adam(trainable, lr=LEARNING_RATE, betas=(0.9, 0.99))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(3)
    condition = null_condition(stage1, len(latents), device)
    for _ in range(steps):
        t = stratified_time(len(latents), generator)[torch.randperm(len(latents), generator=generator)].to(device)
        noised = interpolate(latents, torch.randn(latents.shape, generator=generator).to(device), t)
        teacher, hidden = block_modulations(stage1, t, torch.float32)
        with torch.no_grad(), override_modulations(stage1, teacher):
            target = stage1(noised, t, **condition)
        with override_modulations(stage1, rescaled_modulations(current(), hidden)):
            prediction = stage1(noised, t, **condition)
        loss = (prediction - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    result = current()
    return Modulation(**{field.name: getattr(result, field.name).detach().cpu() for field in fields(result)})
