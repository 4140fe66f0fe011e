"""Floating-point operations of training, counted by torch, and what cards can do."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from pixart.model.dit import DiT

# Dense TFLOP/s by precision, of NVIDIA's data sheets (with sparsity they are twice as many).
PEAKS = {
    "A100": {"bf16": 312.0, "fp32": 156.0},
    "H100": {"bf16": 989.4, "fp8": 1978.9, "fp32": 494.7},
    "H200": {"bf16": 989.4, "fp8": 1978.9, "fp32": 494.7},
    "B200": {"bf16": 2250.0, "fp8": 4500.0, "fp32": 1100.0},
}


def training_flops(config: Mapping[str, Any], side: int, text_tokens: int) -> int:
    """Of one image of `side` latent pixels, forward and backward; products and attention count, the rest is small."""
    with torch.device("meta"):
        model = DiT(**config)
        image, t = torch.empty(1, model.config.in_dim, side, side), torch.empty(1)
        if model.stage == 1:
            condition = {"label": torch.empty(1, dtype=torch.long)}
        else:
            text_mask = torch.empty(1, text_tokens, dtype=torch.bool)
            condition = {"text": torch.empty(1, text_tokens, model.config.text_dim), "text_mask": text_mask}
    with FlopCounterMode(display=False) as counter:
        model(image, t, **condition).sum().backward()
    return counter.get_total_flops()


def peak_tflops(card: str, precision: str) -> float | None:
    """Of a card by its name, where both are known."""
    return next((peaks.get(precision) for name, peaks in PEAKS.items() if name in card), None)
