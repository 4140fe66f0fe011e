"""Floating-point operations of training and sampling, as PyTorch counts them."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pixart.model.dit import DiT


def training_flops(config: Mapping[str, Any], latent_size: int | tuple[int, int], text_tokens: int) -> int:
    """Return the floating-point operations of one image's forward and backward pass.

    `config` is the configuration of a DiT; `latent_size` is the height and width of the latent, or the side of a square
    one, in latent pixels. torch's counter counts GEMMs, convolutions and attention; element-wise operations are
    negligible.
    """
    forward = model_call(config, latent_size, text_tokens)
    with FlopCounterMode(display=False) as counter:
        forward().sum().backward()
    return counter.get_total_flops()


def sampling_flops(
    config: Mapping[str, Any], latent_size: int, text_tokens: int, *, steps: int, guidance: float
) -> int:
    """Return the floating-point operations of denoising one image; guidance other than 1 doubles them."""
    forward = model_call(config, latent_size, text_tokens)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops() * steps * (1 if guidance == 1 else 2)


def model_call(
    config: Mapping[str, Any], latent_size: int | tuple[int, int], text_tokens: int
) -> Callable[[], torch.Tensor]:
    """Return a function that calls a DiT for one image, without memory or computation."""
    height, width = latent_size if isinstance(latent_size, tuple) else (latent_size, latent_size)
    with torch.device("meta"):
        model = DiT(**config)
        latent, t = torch.empty(1, model.config.in_dim, height, width), torch.empty(1)
        if model.stage == 1:
            conditioning = {"label": torch.empty(1, dtype=torch.long)}
        else:
            text_mask = torch.empty(1, text_tokens, dtype=torch.bool)
            conditioning = {"text": torch.empty(1, text_tokens, model.config.text_dim), "text_mask": text_mask}
    return lambda: model(latent, t, **conditioning)
