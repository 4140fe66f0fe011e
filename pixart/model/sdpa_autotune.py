"""Autotuning of attention: time torch's SDPA backends, with and without padded heads, and select the fastest."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from pixart.model.device_timer import median_seconds
from pixart.model.dit import DiT
from pixart.model.sdpa import BACKENDS, AttentionKernel, padded_attention, sdpa_backend

AttentionFunction = Callable[[Tensor, Tensor, Tensor, Tensor | None, int], Tensor]

PADDED_HEAD_DIMS = (0, 80, 96)  # candidates for the model's head dimension of 72; 0: no padding
REPEATS = 5
REQUIRED_TIME_RATIO = 0.95  # to torch's default; smaller gains are within the variation between measurements
TOLERANCE = 0.02  # relative error of a kernel's result: a few BF16 roundings


def make_inputs(
    batch: int, heads: int, head_dim: int, tokens: int, keys: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return random BF16 queries (batch, heads, tokens, head_dim), keys and values (batch, heads, keys, head_dim).

    Their memory layout is the model's: the heads of a token are contiguous.
    """
    generator = torch.Generator(device).manual_seed(0)

    def draw(length: int) -> Tensor:
        values = torch.randn((batch, length, heads, head_dim), generator=generator, device=device)
        return values.bfloat16().transpose(1, 2).requires_grad_()

    return draw(tokens), draw(keys), draw(keys)


def make_padding_mask(batch: int, keys: int, device: torch.device) -> Tensor:
    """Return the mask (batch, 1, 1, keys) of texts whose lengths are spread evenly from keys / 2 to keys."""
    lengths = torch.linspace(keys / 2, keys, batch, device=device)[:, None, None, None]
    return torch.arange(keys, device=device) < lengths


def forward_backward(
    inputs: Sequence[Tensor],
    mask: Tensor | None,
    padded_head_dim: int = 0,
    attention: AttentionFunction | None = None,
) -> list[Tensor]:
    """Return the attention of (q, k, v) and its gradients with respect to these, for an output gradient of ones."""
    q, k, v = inputs
    out = (attention or padded_attention)(q, k, v, mask, padded_head_dim)
    return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]


def time_backend(
    inputs: Sequence[Tensor],
    mask: Tensor | None,
    kernel: AttentionKernel,
    expected: Sequence[Tensor],
    repeats: int,
    *,
    compiled: bool,
) -> float | None:
    """Return the seconds of one kernel's forward and backward pass.

    Return None if the kernel does not support these inputs, or its results differ from `expected`. `compiled` times
    the code that torch.compile generates, where padding and the layout of the heads are fused into other kernels.
    """
    try:
        with (
            sdpa_backend(kernel.backend),
            warnings.catch_warnings(action="ignore"),
        ):  # reasons of an unsupported backend
            if not all(map(is_close, forward_backward(inputs, mask, kernel.padded_head_dim), expected)):
                return None
            attention = torch.compile(padded_attention, fullgraph=True, dynamic=False) if compiled else None
            return median_seconds(lambda: forward_backward(inputs, mask, kernel.padded_head_dim, attention), repeats)
    except RuntimeError:  # the backend does not support the inputs, or memory is insufficient
        return None
    finally:
        if compiled:
            torch._dynamo.reset()  # a compiled graph keeps the backend that it was traced with


def is_close(actual: Tensor, expected: Tensor) -> bool:
    """Return whether the relative error of `actual` is within TOLERANCE."""
    return bool((actual - expected).float().norm() <= TOLERANCE * expected.float().norm())


def time_kernels(
    batch: int,
    heads: int,
    head_dim: int,
    tokens: int,
    keys: int,
    device: torch.device,
    *,
    masked: bool,
    repeats: int = REPEATS,
    compiled: bool | None = None,
) -> dict[AttentionKernel, float]:
    """Return the seconds of a forward and backward pass by supported kernel, torch's default first.

    `compiled` (default: on a GPU) times the kernels as compiled code calls them.
    """
    compiled = device.type == "cuda" if compiled is None else compiled
    inputs = make_inputs(batch, heads, head_dim, tokens, keys, device)
    mask = make_padding_mask(batch, keys, device) if masked else None
    expected = forward_backward(inputs, mask)
    kernels = [
        AttentionKernel(backend=backend, padded_head_dim=padded)
        for backend in BACKENDS
        for padded in PADDED_HEAD_DIMS
        if padded == 0 or padded > head_dim
    ]
    seconds = {
        kernel: time_backend(inputs, mask, kernel, expected, repeats, compiled=compiled)
        for kernel in [AttentionKernel(), *kernels]
    }
    return {kernel: value for kernel, value in seconds.items() if value is not None}


def select_fastest(seconds: Mapping[AttentionKernel, float]) -> AttentionKernel:
    """Return the fastest kernel if it beats torch's default by more than measurements vary, else the default."""
    best = min(seconds, key=seconds.__getitem__)
    default = AttentionKernel()
    return best if seconds[best] < REQUIRED_TIME_RATIO * seconds[default] else default


@functools.cache
def autotune(
    batch: int, heads: int, head_dim: int, tokens: int, text_tokens: int | None, device: torch.device
) -> tuple[AttentionKernel, AttentionKernel]:
    """Return the fastest kernels of self-attention over `tokens` and of cross-attention to `text_tokens` with padding.

    Without `text_tokens` the second one is torch's default.
    """
    self_attention = select_fastest(time_kernels(batch, heads, head_dim, tokens, tokens, device, masked=False))
    if not text_tokens:
        return self_attention, AttentionKernel()
    return self_attention, select_fastest(
        time_kernels(batch, heads, head_dim, tokens, text_tokens, device, masked=True)
    )


def set_kernels_by_tokens(model: DiT, kernels: Mapping[int, tuple[AttentionKernel, AttentionKernel]]) -> None:
    """Make every block of a DiT use kernels of self-attention and cross-attention by its number of image tokens.

    If all are the same, blocks do not look at the number, so that one compiled graph may serve all of them.
    """
    set_kernels(model, *next(iter(kernels.values())))
    if len(set(kernels.values())) == 1:
        return
    for block in model.blocks:
        block.attention.attention.kernels_by_tokens = {tokens: pair[0] for tokens, pair in kernels.items()}
        if hasattr(block, "cross_attention"):
            block.cross_attention.kernels_by_tokens = {tokens: pair[1] for tokens, pair in kernels.items()}


def set_kernels(model: DiT, self_attention: AttentionKernel, cross_attention: AttentionKernel) -> None:
    """Make every block of a DiT use these kernels for its self-attention and its cross-attention."""
    for block in model.blocks:
        block.attention.attention.kernel = self_attention
        if hasattr(block, "cross_attention"):
            block.cross_attention.kernel = cross_attention
