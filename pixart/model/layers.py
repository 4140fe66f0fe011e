"""Layers of the transformer: embeddings, attention, feed-forward, modulation.

Shapes: B images, N image tokens, L text tokens, D width. Module and parameter names are the state-dict
contract with existing checkpoints; the order of definition is the order of their optimizer state.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from pixart.model.sdpa import AttentionKernel, attend

# Under autocast a norm's input is in BF16 and its weight deliberately in float32.
warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")
MAX_PERIOD = 10_000.0  # "Attention is all you need", section 3.5


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of t in [0, 1], sine at even and cosine at odd channels."""

    freqs: Tensor  # (cond_dim / 2,)

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        half = cond_dim // 2
        self.register_buffer("freqs", torch.exp(-math.log(MAX_PERIOD) * torch.arange(half) / (half - 1)))

    def forward(self, t: Tensor) -> Tensor:  # (B,) -> (B, cond_dim)
        return interleaved_sin_cos(t[:, None].float() * self.freqs.float())


class PositionEmbedding(nn.Module):
    """Fixed 2-D sinusoidal position embedding, y in the first half of the channels, x in the second.

    Coordinates are scaled by `base_grid / grid`, so that every resolution spans the reference grid.
    """

    div_term: Tensor  # (D / 4,)

    def __init__(self, dim: int, base_grid: int) -> None:
        super().__init__()
        self.base_grid = base_grid
        half = dim // 2
        self.register_buffer("div_term", torch.exp(-math.log(MAX_PERIOD) * torch.arange(0, half, 2) / half))

    def forward(self, height: int, width: int) -> Tensor:  # -> (height * width, D)
        div_term = self.div_term.float()
        y = torch.arange(height, device=div_term.device) * (self.base_grid / height)
        x = torch.arange(width, device=div_term.device) * (self.base_grid / width)
        rows = interleaved_sin_cos(y[:, None] * div_term)[:, None].expand(-1, width, -1)
        columns = interleaved_sin_cos(x[:, None] * div_term)[None].expand(height, -1, -1)
        return torch.cat([rows, columns], dim=-1).flatten(0, 1)


def interleaved_sin_cos(angles: Tensor) -> Tensor:  # (..., n) -> (..., 2n)
    """Return sines at even and cosines at odd positions of the last dimension."""
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)


def layer_norm(x: Tensor) -> Tensor:
    """Apply LayerNorm without parameters over the last dimension."""
    return F.layer_norm(x, x.shape[-1:])


def modulate(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:  # (B, N, D), (B, D), (B, D) -> (B, N, D)
    """Scale and shift the tokens of each image (adaLN)."""
    return x * (1 + gamma[:, None]) + beta[:, None]


class BiasedRMSNorm(nn.RMSNorm):
    """RMSNorm followed by the addition of a learned bias, as Equinox's RMSNorm does."""

    def __init__(self, size: int, eps: float | None = None) -> None:
        super().__init__(size, eps=eps)
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.bias


@dataclass(frozen=True, kw_only=True, slots=True)
class QKNorm:
    """Variant of the RMSNorm of queries and keys.

    A bias of the keys' norm would add the same value to all logits of a query, which softmax ignores; only the norm of
    the queries can have one. `eps` is None for the smallest number of the input's dtype, PyTorch's default.
    """

    eps: float | None = None
    bias: bool = False


class Attention(nn.Module):
    """Multi-head attention with biases and a per-head RMSNorm of queries and keys."""

    fused_projections = False  # one GEMM for several linears; their hooks are not called
    kernel = AttentionKernel()
    kernels_by_tokens: Mapping[int, AttentionKernel] = MappingProxyType({})  # of numbers of queries that have another

    def __init__(self, dim: int, num_heads: int, kv_dim: int, qk_norm: QKNorm = QKNorm()) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(kv_dim, dim)
        self.v_proj = nn.Linear(kv_dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        self.q_norm = (BiasedRMSNorm if qk_norm.bias else nn.RMSNorm)(dim // num_heads, eps=qk_norm.eps)
        self.k_norm = nn.RMSNorm(dim // num_heads, eps=qk_norm.eps)

    def forward(self, query: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the attention (B, N, D) of query (B, N, D) over context (B, L, kv_dim).

        `mask` (B, L) is true for the keys to attend to.
        """
        if query is context:
            projected = self.project([self.q_proj, self.k_proj, self.v_proj], query)
        else:
            projected = [self.q_proj(query), *self.project([self.k_proj, self.v_proj], context)]
        # The norms precede the transposition: one kernel then computes a norm in either pass, in the GEMM's layout.
        q, k, v = (rearrange(tensor, "b n (h d) -> b n h d", h=self.num_heads) for tensor in projected)
        q, k, v = (tensor.transpose(1, 2) for tensor in (self.q_norm(q), self.k_norm(k), v))
        kernel = self.kernels_by_tokens.get(q.shape[2], self.kernel) if self.kernels_by_tokens else self.kernel
        attended = attend(q, k, v, None if mask is None else mask[:, None, None], kernel)
        return self.out_proj(rearrange(attended, "b h n d -> b n (h d)"))

    def project(self, linears: list[nn.Linear], x: Tensor) -> Sequence[Tensor]:
        """Return each linear's output for x, by one GEMM if projections are fused and the linears support it."""
        if not self.fused_projections:
            return [linear(x) for linear in linears]
        if all(type(linear) is nn.Linear for linear in linears):
            return fused_gemm(linears, x)
        fused_forward = getattr(linears[0], "fused_forward", None)
        return fused_forward(linears, x) if fused_forward else [linear(x) for linear in linears]


def fused_gemm(linears: Sequence[nn.Linear], x: Tensor) -> Sequence[Tensor]:
    """Return each linear's output for x, by one GEMM of their concatenated weights."""
    weight, bias = (torch.cat([getattr(linear, name) for linear in linears]) for name in ("weight", "bias"))
    return F.linear(x, weight, bias).split([linear.out_features for linear in linears], dim=-1)


class SelfAttention(nn.Module):
    """Self-attention with adaLN: x + alpha * attention(modulate(LN(x)))."""

    def __init__(self, dim: int, num_heads: int, qk_norm: QKNorm) -> None:
        super().__init__()
        self.attention = Attention(dim, num_heads, kv_dim=dim, qk_norm=qk_norm)

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor, alpha: Tensor) -> Tensor:
        modulated = modulate(layer_norm(x), gamma, beta)
        return x + alpha[:, None] * self.attention(modulated, modulated)


class FeedForward(nn.Module):
    """Feed-forward with adaLN: x + alpha * mlp(modulate(LN(x)))."""

    def __init__(self, dim: int, mlp_ratio: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, mlp_ratio * dim)
        self.linear2 = nn.Linear(mlp_ratio * dim, dim)

    def forward(self, x: Tensor, gamma: Tensor, beta: Tensor, alpha: Tensor) -> Tensor:
        modulated = modulate(layer_norm(x), gamma, beta)
        return x + alpha[:, None] * self.linear2(F.silu(self.linear1(modulated)))


class Block(nn.Module):
    """Transformer block of stage 1 (with `cond_dim`) or stage 2 (with `text_dim`).

    In stage 1 the block computes its modulation from the condition (adaLN-zero). In stage 2 it adds a learned offset to
    a modulation that all blocks share (adaLN-single, PixArt-alpha section 2.3) and attends to the text.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: int,
        cond_dim: int | None,
        text_dim: int | None,
        qk_norm: QKNorm = QKNorm(),
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, num_heads, qk_norm)
        if text_dim is not None:
            self.cross_attention = Attention(dim, num_heads, kv_dim=text_dim, qk_norm=qk_norm)
            self.adaLNembed = nn.Parameter(torch.zeros(6 * dim))
        self.mlp = FeedForward(dim, mlp_ratio)
        if cond_dim is not None:
            self.adaLN1 = nn.Linear(cond_dim, dim)
            self.adaLN2 = nn.Linear(dim, 6 * dim)

    def modulation(self, condition: Tensor) -> Tensor:
        """Return the block's modulation (B, 6 D).

        `condition` is the class and time embedding (B, cond_dim) in stage 1, the shared modulation (B, 6 D) in stage 2.
        """
        if hasattr(self, "adaLNembed"):
            return condition + self.adaLNembed
        return self.adaLN2(F.silu(self.adaLN1(condition)))

    def forward(self, x: Tensor, condition: Tensor, text: Tensor | None, text_mask: Tensor | None) -> Tensor:
        gamma1, beta1, gamma2, beta2, alpha1, alpha2 = self.modulation(condition).chunk(6, dim=-1)
        x = self.attention(x, gamma1, beta1, alpha1)
        if text is not None:
            x = x + self.cross_attention(x, text, text_mask)
        return self.mlp(x, gamma2, beta2, alpha2)
