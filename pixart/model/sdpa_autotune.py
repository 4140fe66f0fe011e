"""The fastest attention kernel here, measured: torch has several, and a head may suit one better padded."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from pixart.model.device_timer import seconds
from pixart.model.sdpa import BACKENDS, Kernel, by, padded

Forward = Callable[[Tensor, Tensor, Tensor, Tensor | None, int], Tensor]

PADDINGS = (0, 80, 96)  # widths to try for a head of 72
REPEATS = 5
CLEARLY = 0.95  # of the time
AGREEMENT = 0.02  # relative: a few roundings of BF16


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


def there_and_back(
    given: Sequence[Tensor], mask: Tensor | None, to: int = 0, forward: Forward | None = None
) -> list[Tensor]:
    q, k, v = given
    out = (forward or padded)(q, k, v, mask, to)
    return [out, *torch.autograd.grad(out, given, torch.ones_like(out))]


def alone(
    given: Sequence[Tensor],
    mask: Tensor | None,
    kernel: Kernel,
    exact: Sequence[Tensor],
    repeats: int,
    *,
    compiled: bool,
) -> float | None:
    """Return the seconds of forward and backward with one kernel.

    None if the kernel does not take these operands, or its result differs from `exact`. `compiled`: the time is that of
    the code which torch.compile generates, where padding and the layout of the heads are part of other kernels.
    """
    try:
        with by(kernel.backend), warnings.catch_warnings(action="ignore"):  # of why a kernel cannot
            if not all(map(agree, there_and_back(given, mask, kernel.width), exact)):
                return None
            forward = torch.compile(padded, fullgraph=True, dynamic=False) if compiled else None
            return seconds(lambda: there_and_back(given, mask, kernel.width, forward), repeats)
    except RuntimeError:  # no kernel, or too little memory
        return None
    finally:
        if compiled:
            torch._dynamo.reset()  # a graph keeps the backend that it was traced with


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
    compiled: bool | None = None,
) -> dict[Kernel, float]:
    """Return the seconds of forward and backward by kernel, torch's own choice first.

    `compiled` (default: on a GPU) measures the kernels as compiled code calls them.
    """
    compiled = device.type == "cuda" if compiled is None else compiled
    given = operands(batch, heads, width, tokens, keys, device)
    mask = padding_mask(batch, keys, device) if masked else None
    own = Kernel()
    exact = there_and_back(given, mask)
    kernels = [own, *(Kernel(backend=name, width=to) for name in BACKENDS for to in PADDINGS)]
    found = {
        kernel: alone(given, mask, kernel, exact, repeats, compiled=compiled)
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
