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


class Denoiser:
    """Takes steps of batches of trajectories by a model.

    The conditioning of a batch is kept until other images are in it, since putting it together copies all of it.
    """

    def __init__(self, model: DiT) -> None:
        self.model = model
        self._batch: list[Trajectory] = []
        self._conditioning: dict[str, Tensor] = {}

    @torch.no_grad()
    def advance(self, batch: Sequence[Trajectory]) -> None:
        """Take one Euler step of each trajectory, all by one call of the model.

        The model is evaluated twice for an image with guidance, and once for one whose guidance is 1.
        """
        guided = [index for index, item in enumerate(batch) if item.guidance != 1]
        latents = torch.stack([item.latents for item in batch])
        sigmas = torch.stack([item.sigmas[item.step : item.step + 2] for item in batch])
        t = (1 - sigmas[:, 0]).to(self.model.device)
        velocity, unconditional = self.model(
            torch.cat([latents, latents[guided]]), torch.cat([t, t[guided]]), **self._conditioning_of(batch, guided)
        ).split([len(batch), len(guided)])
        if guided:
            velocity = velocity.clone()
            for guidance, indices in groups(guided, lambda index: batch[index].guidance):
                rows = [guided.index(index) for index in indices]
                velocity[indices] = unconditional[rows] + guidance * (velocity[indices] - unconditional[rows])
        lengths = (sigmas[:, 1] - sigmas[:, 0]).to(self.model.device)[:, None, None, None]
        for item, output in zip(batch, latents.float() + lengths * -velocity.float(), strict=True):
            item.latents = output
            item.step += 1
            item.largest_batch = max(item.largest_batch, len(batch))

    def _conditioning_of(self, batch: Sequence[Trajectory], guided: Sequence[int]) -> dict[str, Tensor]:
        """Return the conditionings of a batch, followed by the null conditionings of its images with guidance."""
        if list(batch) != self._batch:
            self._batch = list(batch)
            self._conditioning = {
                key: torch.cat(
                    [
                        *(item.conditioning[key] for item in batch),
                        *(batch[index].null_conditioning[key] for index in guided),
                    ]
                )
                for key in batch[0].conditioning
            }
        return self._conditioning


def groups(indices: Iterable[int], key: Callable[[int], float]) -> list[tuple[float, list[int]]]:
    """Return the indices by their key, in the order of the first of each."""
    result: dict[float, list[int]] = {}
    for index in indices:
        result.setdefault(key(index), []).append(index)
    return list(result.items())
