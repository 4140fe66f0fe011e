"""Scaled dot-product attention by a chosen kernel of torch, heads padded where that is asked for."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """A backend of BACKENDS, the others where it cannot, and the width that a head is padded to; 0: as it is."""

    backend: str | None = None  # None: torch's own choice
    width: int = 0

    def __str__(self) -> str:
        return (self.backend or "torch's own choice") + (f", heads padded to {self.width}" if self.width else "")


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kernel: Kernel) -> Tensor:
    """q (B, heads, N, width), k and v (B, heads, L, width), mask (B, 1, 1, L) true where a key counts -> as q."""
    with by(kernel.backend, *BACKENDS):
        return padded(q, k, v, mask, kernel.width)


def by(backend: str | None, *others: str) -> AbstractContextManager[None]:
    """The others where the first one cannot; torch's own choice where that is None."""
    if backend is None:
        return nullcontext()
    order = [backend, *(name for name in others if name != backend)]
    return sdpa_kernel([BACKENDS[name] for name in order], set_priority=True)


def padded(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, to: int) -> Tensor:
    width = q.shape[-1]
    if to > width:
        q, k, v = (F.pad(part, (0, to - width)) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=width**-0.5)[..., :width]
