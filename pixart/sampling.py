"""Sampling with classifier-free guidance, by diffusers' flow-match Euler scheduler."""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from pixart.model.dit import DiT


def seeded_noise(model: DiT, side: int, seeds: Sequence[int]) -> Tensor:
    """Noise (B, C, side, side), on the CPU: each sample's depends on its own seed alone."""
    shape = (model.config.in_dim, side, side)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample(
    model: DiT,
    condition: dict[str, Tensor],
    null: dict[str, Tensor],
    noise: Tensor,
    *,
    steps: int,
    guidance: float,
    scheduler: FlowMatchEulerDiscreteScheduler | None = None,
) -> Tensor:
    """Noise (B, C, H, W) -> normalized latents (B, C, H, W), for a condition and its "none".

    Both are keyword arguments of the model, of B rows each. A guidance of 1 runs the model once a step.
    """
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
