"""Normalization of latents, which a checkpoint stores with the pixel range that the latents were encoded from."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@functools.cache
def per_channel(values: tuple[float, ...], device: torch.device | str) -> Tensor:
    """Return the values as a tensor (1, C, 1, 1); cached, as a copy to a GPU synchronizes."""
    return torch.tensor(values, device=device).view(1, -1, 1, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalization:
    """Normalization (latent - mean) / std, per channel, of the model's input.

    `pixel_range` is the range of pixel values that the VAE encoded the latents from, see `pixart.data.encoders.vae`.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixel_range: tuple[int, int] = (-1, 1)

    def tensors(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation, each (1, C, 1, 1)."""
        return per_channel(self.mean, device), per_channel(self.std, device)

    def apply(self, latents: Tensor) -> Tensor:
        """Normalize latents (B, C, h, w), in float32."""
        mean, std = self.tensors(latents.device)
        return (latents.float() - mean) / std

    def undo(self, normalized: Tensor) -> Tensor:
        """Return the latents (B, C, h, w) of normalized ones, in float32."""
        mean, std = self.tensors(normalized.device)
        return normalized.float() * std + mean
