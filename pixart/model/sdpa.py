"""Attention by the kernel that is fastest here: torch has several, and a head's width may suit one better padded."""

import functools
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pixart.model.device_timer import seconds

BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PADDINGS = (0, 80, 96)  # widths to try for a head of 72
REPEATS = 5
CLEARLY = 0.95  # of the time
AGREEMENT = 0.02  # relative: a few roundings of BF16


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


def operands(batch: int, heads: int, width: int, tokens: int, keys: int, device: torch.device) -> list[Tensor]:
    """Queries, keys and values in BF16, as a model hands them over: heads lie within a token."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(batch, rows, heads, width) for rows in (tokens, keys, keys)]
    drawn = [torch.randn(shape, generator=generator, device=device).bfloat16().transpose(1, 2) for shape in shapes]
    return [tensor.requires_grad_() for tensor in drawn]


def padding_mask(batch: int, keys: int, device: torch.device) -> Tensor:
    """Of texts that fill between half of the keys and all of them (batch, 1, 1, keys)."""
    lengths = torch.linspace(keys / 2, keys, batch, device=device)[:, None, None, None]
    return torch.arange(keys, device=device) < lengths


def there_and_back(given: Sequence[Tensor], mask: Tensor | None, to: int = 0) -> list[Tensor]:
    q, k, v = given
    out = padded(q, k, v, mask, to)
    return [out, *torch.autograd.grad(out, given, torch.ones_like(out))]


def alone(
    given: Sequence[Tensor], mask: Tensor | None, kernel: Kernel, exact: Sequence[Tensor], repeats: int
) -> float | None:
    """Seconds of the way there and back; None where the kernel cannot, or does not come to what is exact."""
    try:
        with by(kernel.backend), warnings.catch_warnings(action="ignore"):  # of why a kernel cannot
            if not all(map(agree, there_and_back(given, mask, kernel.width), exact)):
                return None
            return seconds(lambda: there_and_back(given, mask, kernel.width), repeats)
    except RuntimeError:  # no kernel, or too little memory
        return None


def agree(found: Tensor, exact: Tensor) -> bool:
    return bool((found - exact).float().norm() <= AGREEMENT * exact.float().norm())


def timings(
    batch: int,
    heads: int,
    width: int,
    tokens: int,
    keys: int,
    device: torch.device,
    *,
    masked: bool,
    repeats: int = REPEATS,
) -> dict[Kernel, float]:
    """Seconds there and back by each kernel that can, torch's own choice the first of them."""
    given = operands(batch, heads, width, tokens, keys, device)
    mask = padding_mask(batch, keys, device) if masked else None
    own = Kernel()
    exact = there_and_back(given, mask)
    kernels = [own, *(Kernel(backend=name, width=to) for name in BACKENDS for to in PADDINGS)]
    found = {
        kernel: alone(given, mask, kernel, exact, repeats)
        for kernel in kernels
        if kernel.width == 0 or kernel.width > width
    }
    return {kernel: taken for kernel, taken in found.items() if taken is not None}


def fastest(found: Mapping[Kernel, float]) -> Kernel:
    """Torch's own choice unless another is faster by more than such measurements differ."""
    best = min(found, key=found.__getitem__)
    return best if found[best] < CLEARLY * found[Kernel()] else Kernel()


@functools.cache
def measured(
    batch: int, heads: int, width: int, tokens: int, text: int | None, device: torch.device
) -> tuple[Kernel, Kernel]:
    """The fastest among `tokens` of an image, and from these to `text` states of which some are padding."""
    to_image = fastest(timings(batch, heads, width, tokens, tokens, device, masked=False))
    return to_image, fastest(timings(batch, heads, width, tokens, text, device, masked=True)) if text else Kernel()


def use(model: nn.Module, self_attention: Kernel, cross_attention: Kernel) -> None:
    """Has every block attend to the image, and to the text, by these."""
    for block in model.dit_blocks:
        block.attention.attention.kernel = self_attention
        if hasattr(block, "cross_attention"):
            block.cross_attention.kernel = cross_attention
