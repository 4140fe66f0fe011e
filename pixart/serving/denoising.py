"""Denoising of images that are at different steps: images join and leave a batch between two steps.

The arithmetic is that of `pixart.sampling.denoise`; an image alone in its batch has the same bits.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from pixart.model.dit import DiT


@dataclass(kw_only=True, eq=False)
class Trajectory:
    """An image on its way from noise to data. The conditionings are keyword arguments of the model, for one image."""

    latents: Tensor  # (C, h, w), normalized
    conditioning: dict[str, Tensor]
    null_conditioning: dict[str, Tensor]
    sigmas: Tensor  # (steps + 1,) from 1 to 0, on the CPU
    guidance: float
    step: int = 0
    largest_batch: int = 0  # images in the largest batch that this one was part of
    preview_steps: frozenset[int] = field(default_factory=frozenset)

    @property
    def is_finished(self) -> bool:
        return self.step == len(self.sigmas) - 1


def noise_sigmas(scheduler: FlowMatchEulerDiscreteScheduler, steps: int) -> Tensor:
    """Return the noise levels (steps + 1,) of the scheduler, as `denoise` sets them."""
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    return scheduler.sigmas.clone()


@torch.no_grad()
def advance(model: DiT, batch: Sequence[Trajectory]) -> None:
    """Take one Euler step of each trajectory, all by one call of the model.

    The model is evaluated twice for an image with guidance, and once for one whose guidance is 1.
    """
    device = model.device
    guided = [index for index, item in enumerate(batch) if item.guidance != 1]
    evaluated = [*batch, *(batch[index] for index in guided)]
    latents = torch.stack([item.latents for item in evaluated])
    t = torch.tensor([1 - item.sigmas[item.step].item() for item in evaluated], device=device)
    conditioning = {
        key: torch.cat(
            [*(item.conditioning[key] for item in batch), *(batch[index].null_conditioning[key] for index in guided)]
        )
        for key in batch[0].conditioning
    }
    velocity, unconditional = model(latents, t, **conditioning).split([len(batch), len(guided)])
    if guided:
        velocity = velocity.clone()
        for guidance, indices in groups(guided, lambda index: batch[index].guidance):
            rows = [guided.index(index) for index in indices]
            velocity[indices] = unconditional[rows] + guidance * (velocity[indices] - unconditional[rows])
    for item, output in zip(batch, -velocity.float(), strict=True):
        item.latents = item.latents.float() + (item.sigmas[item.step + 1] - item.sigmas[item.step]) * output
        item.step += 1
        item.largest_batch = max(item.largest_batch, len(batch))


def groups(indices: Iterable[int], key: Callable[[int], float]) -> list[tuple[float, list[int]]]:
    """Return the indices by their key, in the order of the first of each."""
    result: dict[float, list[int]] = {}
    for index in indices:
        result.setdefault(key(index), []).append(index)
    return list(result.items())
