"""Sampling with classifier-free guidance, by diffusers' flow-match Euler scheduler."""

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from pixart.model.dit import DiT


def sample(
    model: DiT,
    condition: dict[str, Tensor],
    null: dict[str, Tensor],
    *,
    side: int,
    steps: int,
    guidance: float,
    seed: int,
) -> Tensor:
    """Normalized latents (B, C, side, side) for a condition and its "none", keyword arguments of the model.

    The noise of sample i depends on `seed + i` alone, not on the batch.
    """
    count, shape = len(next(iter(condition.values()))), (model.config.in_dim, side, side)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + index)) for index in range(count)]
    return denoise(model, condition, null, torch.stack(noise), steps=steps, guidance=guidance)


@torch.no_grad()
def denoise(
    model: DiT,
    condition: dict[str, Tensor],
    null: dict[str, Tensor],
    noise: Tensor,
    *,
    steps: int,
    guidance: float,
    scheduler: FlowMatchEulerDiscreteScheduler | None = None,
) -> Tensor:
    """Noise (B, C, H, W) -> normalized latents (B, C, H, W). A guidance of 1 runs the model once a step."""
    device = model.patchify.weight.device
    latents, count = noise.to(device), len(noise)
    both = {key: torch.cat([value, null[key]]) for key, value in condition.items()}

    # diffusers counts sigma from 1 (noise) to 0 (data) and predicts noise - data; the model has t = 1 - sigma.
    scheduler = scheduler or FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True):
        t = torch.full((count,), 1 - sigma.item(), device=device)
        if guidance == 1:
            velocity = model(latents, t, **condition)
        else:
            conditional, unconditional = model(latents.repeat(2, 1, 1, 1), t.repeat(2), **both).chunk(2)
            velocity = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(-velocity.float(), timestep, latents).prev_sample
    return latents
