"""A small stage-2 model in FP8 and its inputs, both deterministic."""

import torch
from torch import Tensor, nn

from pixart.model.dit import DiT
from pixart.model.fp8 import linear
from pixart.model.fp8.plan import Plan

SIZES = {"dim": 48, "cond_dim": 32, "num_heads": 4, "base_image_size": 8, "text_dim": 32}


def linears_of(model: DiT) -> tuple[str, ...]:
    """Return the names of the linears of the blocks."""
    return tuple(
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "dit_blocks" in name
    )


def plan_of(model: DiT) -> Plan:
    return Plan(linears=linears_of(model), history=4)


def fp8_model(blocks: int, linears: tuple[str, ...] | None = None) -> DiT:
    """Return a model with `linears` (default: all) in FP8 and random parameters, so that every gradient is nonzero."""
    torch.manual_seed(0)
    model = DiT(**SIZES, num_blocks=blocks)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    linear.swap_linears(model, Plan(linears=linears_of(model) if linears is None else linears, history=4))
    return model


def inputs(tokens: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return latents, t, text of `tokens` tokens and its mask, for four images."""
    generator = torch.Generator().manual_seed(5)
    x, text = torch.randn(4, 16, 8, 8, generator=generator), torch.randn(4, tokens, 32, generator=generator)
    return x, torch.rand(4, generator=generator), text, torch.arange(tokens) < torch.tensor([[tokens], [3], [1], [4]])


def sqnr(expected: Tensor, actual: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio in dB."""
    return (10 * torch.log10(expected.square().sum() / (expected - actual).square().sum())).item()
