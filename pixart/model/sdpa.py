"""Scaled dot-product attention with a chosen torch backend and optional padding of the heads."""

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
class AttentionKernel:
    """A preferred SDPA backend and the head dimension that queries, keys and values are zero-padded to.

    Backends other than the preferred one are used for inputs that it does not support.
    """

    backend: str | None = None  # a key of BACKENDS; None: torch's default choice
    padded_head_dim: int = 0  # 0: no padding

    def __str__(self) -> str:
        padding = f", heads padded to {self.padded_head_dim}" if self.padded_head_dim else ""
        return (self.backend or "torch's default") + padding


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kernel: AttentionKernel) -> Tensor:
    """Return the attention of q (B, heads, N, head_dim) over k and v (B, heads, L, head_dim), shaped like q.

    `mask` (B, 1, 1, L) is true for the keys to attend to.
    """
    with sdpa_backend(kernel.backend, *BACKENDS):
        return padded_attention(q, k, v, mask, kernel.padded_head_dim)


def sdpa_backend(backend: str | None, *fallbacks: str) -> AbstractContextManager[None]:
    """Select an SDPA backend, then `fallbacks` in order for inputs that it does not support; None: torch's default."""
    if backend is None:
        return nullcontext()
    order = [backend, *(name for name in fallbacks if name != backend)]
    return sdpa_kernel([BACKENDS[name] for name in order], set_priority=True)


def padded_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, padded_head_dim: int) -> Tensor:
    """Compute attention with heads zero-padded to `padded_head_dim` if that is larger than theirs, shaped like q."""
    head_dim = q.shape[-1]
    if padded_head_dim > head_dim:
        q, k, v = (F.pad(tensor, (0, padded_head_dim - head_dim)) for tensor in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=head_dim**-0.5)[..., :head_dim]
