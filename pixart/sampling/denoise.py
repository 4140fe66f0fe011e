"""Sampling with classifier-free guidance and the flow-match Euler scheduler of diffusers."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pixart.model.dit import DiT

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler


def sample(
    model: DiT,
    conditioning: dict[str, Tensor],
    null_conditioning: dict[str, Tensor],
    *,
    latent_size: int | tuple[int, int],
    steps: int,
    guidance: float,
    seed: int,
    time_shift: float = 1.0,
) -> Tensor:
    """Sample normalized latents (B, C, H, W), of the height and width `latent_size`; an int is a square's side.

    The conditioning and the null conditioning for guidance are keyword arguments of the model. The initial noise of
    sample i depends only on `seed + i`, not on the batch. `time_shift` is that of training at this size.
    """
    size = latent_size if isinstance(latent_size, tuple) else (latent_size, latent_size)
    count, shape = len(next(iter(conditioning.values()))), (model.config.in_dim, *size)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + index)) for index in range(count)]
    return denoise(
        model,
        conditioning,
        null_conditioning,
        torch.stack(noise),
        steps=steps,
        guidance=guidance,
        scheduler=make_scheduler(time_shift),
    )


def make_scheduler(time_shift: float = 1.0) -> "FlowMatchEulerDiscreteScheduler":
    """Return the scheduler that shifts its noise levels like training does."""
    from diffusers import FlowMatchEulerDiscreteScheduler  # imports SciPy, which takes a second; few ranks sample

    return FlowMatchEulerDiscreteScheduler(shift=time_shift)


@torch.no_grad()
def denoise(
    model: DiT,
    conditioning: dict[str, Tensor],
    null_conditioning: dict[str, Tensor],
    noise: Tensor,
    *,
    steps: int,
    guidance: float,
    scheduler: "FlowMatchEulerDiscreteScheduler | None" = None,
    on_step: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Denoise noise (B, C, H, W) to normalized latents (B, C, H, W).

    `guidance` is the scale of classifier-free guidance; with 1, the unconditional model is not evaluated. `on_step` is
    called after each step with its index, the scheduler's timestep () and the latents.
    """
    device = model.patchify.weight.device
    latents, count = noise.to(device), len(noise)
    both = {key: torch.cat([value, null_conditioning[key]]) for key, value in conditioning.items()}

    # In diffusers, sigma falls from 1 (noise) to 0 (data) and the velocity is noise - data; the model uses
    # t = 1 - sigma and the opposite sign.
    scheduler = scheduler or make_scheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    for step, (timestep, sigma) in enumerate(zip(scheduler.timesteps, scheduler.sigmas[:-1], strict=True)):
        t = torch.full((count,), 1 - sigma.item(), device=device)
        if guidance == 1:
            velocity = model(latents, t, **conditioning)
        else:
            conditional, unconditional = model(latents.repeat(2, 1, 1, 1), t.repeat(2), **both).chunk(2)
            velocity = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(-velocity.float(), timestep, latents).prev_sample
        if on_step:
            on_step(step, timestep, latents)
    return latents
