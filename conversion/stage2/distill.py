"""The third way from stage 1 to stage 2: the fitted modulation, trained on until the outputs agree.

Trained are the last layer of the shared MLP, the offsets E and, for the weights themselves, the scales s; everything
else is stage 1's and stays. The loss is the mean squared difference of the velocities under t's training distribution.
"""

from dataclasses import fields

import torch
from torch import Tensor

from conversion.stage2.modulation import Modulation, evaluate, modulated, own_modulations, silent
from pixart.model.dit import DiT
from pixart.model.rectified_flow import interpolate, stratified_time

STEPS = 300
LEARNING_RATE = 1e-3
SHARES = (0, 0, 1, 1, 2, 3)  # of the six chunks of a modulation, those that have a scale in common


def distilled(stage1: DiT, start: Modulation, latents: Tensor, *, free_scales: bool, steps: int = STEPS) -> Modulation:
    """`latents` (B, C, h, w) are normalized, on the model's device."""
    device, blocks = latents.device, len(start.offsets)
    free = {name: getattr(start, name).to(device).clone().requires_grad_() for name in ("weight", "bias", "offsets")}
    ratio = torch.zeros(blocks, 4, start.offsets.shape[1] // 6, device=device, requires_grad=free_scales)
    first = start.scales.to(device).view(blocks, 6, -1)
    stage1.requires_grad_(False)

    def modulation() -> Modulation:
        return Modulation(**free, scales=(first * (1 + ratio[:, SHARES])).flatten(1))

    trained = [*free.values(), *([ratio] if free_scales else [])]
    optimizer = torch.optim.Adam(trained, lr=LEARNING_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(3)
    condition = silent(stage1, len(latents), device)
    for _ in range(steps):
        t = stratified_time(len(latents), generator)[torch.randperm(len(latents), generator=generator)].to(device)
        noised = interpolate(latents, torch.randn(latents.shape, generator=generator).to(device), t)
        own, hidden = own_modulations(stage1, t, torch.float32)
        with torch.no_grad(), modulated(stage1, own):
            wanted = stage1(noised, t, **condition)
        with modulated(stage1, evaluate(modulation(), hidden)):
            got = stage1(noised, t, **condition)
        loss = (got - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    found = modulation()
    return Modulation(**{field.name: getattr(found, field.name).detach().cpu() for field in fields(found)})
