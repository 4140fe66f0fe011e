"""The normalization of latents that a checkpoint carries with it."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@functools.cache
def by_channel(values: tuple[float, ...], device: torch.device | str) -> Tensor:  # copied once: a copy waits for a GPU
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalization:
    """Latents as the model sees them: (latent - mean) / std, per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def tensors(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:  # each (1, C, 1, 1)
        return by_channel(self.mean, device), by_channel(self.std, device)

    def apply(self, latents: Tensor) -> Tensor:
        mean, std = self.tensors(latents.device)
        return (latents.float() - mean) / std

    def undo(self, normalized: Tensor) -> Tensor:
        mean, std = self.tensors(normalized.device)
        return normalized.float() * std + mean
