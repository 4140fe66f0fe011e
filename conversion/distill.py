"""The third way from stage 1 to stage 2: the fitted modulation, trained on until the outputs agree.

Trained are the last layer of the shared MLP, the offsets E and, for the weights themselves, the scales s; everything
else is stage 1's and stays. The loss is the mean squared difference of the velocities under t's training distribution.
"""

import torch
from torch import Tensor
from torch.func import functional_call

from conversion.modulation import Modulation, absorbed_scales, silent
from pixart.model.dit import DiT
from pixart.model.flow import interpolate, stratified_time

STEPS = 300
LEARNING_RATE = 1e-3
SHARES = (0, 0, 1, 1, 2, 3)  # of the six chunks of a modulation, those that have a scale in common


def distilled(
    stage1: DiT, stage2: DiT, start: Modulation, latents: Tensor, *, free_scales: bool, steps: int = STEPS
) -> Modulation:
    """`stage2` has the modulation `start`; `latents` (B, C, h, w) are normalized, on the models' device."""
    device, blocks = latents.device, len(start.offsets)
    free = {name: getattr(start, name).to(device).clone().requires_grad_() for name in ("weight", "bias", "offsets")}
    ratio = torch.zeros(blocks, 4, start.offsets.shape[1] // 6, device=device, requires_grad=free_scales)
    first = start.scales.to(device).view(blocks, 6, -1)
    stage1.requires_grad_(False)
    stage2.requires_grad_(False)

    def scales() -> Tensor:
        return (first * (1 + ratio[:, SHARES])).flatten(1)

    def overrides() -> dict[str, Tensor]:
        found = {"adaLN2_single.weight": free["weight"], "adaLN2_single.bias": free["bias"]}
        for block, own in enumerate(scales()):
            found[f"dit_blocks.{block}.adaLNembed"] = free["offsets"][block]
            if free_scales:
                found |= {name: stage1.get_parameter(name) * scale for name, scale in absorbed_scales(block, own)}
        return found

    trained = [*free.values(), *([ratio] if free_scales else [])]
    optimizer = torch.optim.Adam(trained, lr=LEARNING_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(3)
    wanted_of, got_of = (silent(model, len(latents), device) for model in (stage1, stage2))
    for _ in range(steps):
        t = stratified_time(len(latents), generator)[torch.randperm(len(latents), generator=generator)].to(device)
        noised = interpolate(latents, torch.randn(latents.shape, generator=generator).to(device), t)
        with torch.no_grad():
            wanted = stage1(noised, t, **wanted_of)
        got = functional_call(stage2, overrides(), (noised, t), got_of)
        loss = (got - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return Modulation(**{name: tensor.detach().cpu() for name, tensor in free.items()}, scales=scales().detach().cpu())
