"""Rectified flow: x_t = t * data + (1 - t) * noise, velocity = data - noise; t = 0 is noise, t = 1 is data."""

import torch
from torch import Tensor


def sample_time(batch: int, generator: torch.Generator) -> Tensor:
    """Draw logit-normal times in (0, 1) (Stable Diffusion 3, section 3.1, location 0, scale 1) -> (batch,)."""
    return torch.randn(batch, generator=generator, device=generator.device).sigmoid()


def fixed_time(batch: int) -> Tensor:
    """Return the median of each of `batch` equally likely strata of the same distribution, ascending -> (batch,)."""
    return torch.special.ndtri((torch.arange(batch) + 0.5) / batch).sigmoid()


def stratified_time(batch: int, generator: torch.Generator) -> Tensor:
    """Draw one time from each of `batch` equally likely strata of the same distribution, ascending -> (batch,)."""
    uniform = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    return torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6)).sigmoid()


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Return times t of any shape, shifted towards noise (Stable Diffusion 3, equation 23); 1 returns `t` unchanged."""
    return t if shift == 1 else t / (shift + (1 - shift) * t)


def interpolate(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return x_t (B, C, H, W) of data and noise (B, C, H, W) at t (B,)."""
    t = t.view(-1, 1, 1, 1)
    return t * data + (1 - t) * noise


def flow_loss(velocity: Tensor, data: Tensor, noise: Tensor) -> Tensor:
    """Return the mean squared error of the predicted velocity, computed in float32 -> ()."""
    return (velocity.float() - (data - noise)).square().mean()
