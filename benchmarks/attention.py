"""Attention of the model's head width, 72, by each backend that torch has, as it is and padded to 80 and 96.

    python -m benchmarks.attention [--batch 320]

Forward and backward; self-attention over 256 tokens, and over 120 states of text with a mask.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import measure

HEADS, WIDTH, TOKENS, TEXT = 16, 72, 256, 120
BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def operands(batch: int, keys: int) -> tuple[list[Tensor], Tensor | None]:
    """Queries, keys and values (batch, heads, tokens, width), and a mask where they are of text."""
    device = measure.device()
    lengths = (TOKENS, keys, keys)
    given = [torch.randn(batch, HEADS, n, WIDTH, device=device, dtype=torch.bfloat16) for n in lengths]
    mask = torch.arange(keys, device=device) < torch.randint(20, keys + 1, (batch, 1, 1, 1), device=device)
    return [tensor.requires_grad_() for tensor in given], mask if keys == TEXT else None


def seconds(given: list[Tensor], mask: Tensor | None, width: int, backend: SDPBackend, repeats: int) -> float:
    grad = torch.ones_like(given[0])

    def there_and_back() -> None:
        padded = [F.pad(tensor, (0, width - WIDTH)) for tensor in given]
        out = F.scaled_dot_product_attention(*padded, attn_mask=mask, scale=WIDTH**-0.5)[..., :WIDTH]
        torch.autograd.grad(out, given, grad)

    with sdpa_kernel(backend):
        return measure.seconds(there_and_back, repeats)


def main() -> None:
    parser = measure.parser(__doc__, repeats=20)
    options = parser.parse_args()
    lines = [
        f"# Attention there and back, {HEADS} heads of width {WIDTH}, batch {options.batch}, on {measure.card()}",
        "",
        f"torch {torch.__version__}; milliseconds, the padding included.",
        "",
        "| backend | padded to | image | text, masked |",
        "|---|---|---|---|",
    ]
    for name, backend in BACKENDS.items():
        for width in (WIDTH, 80, 96):
            cells = []
            for keys in (TOKENS, TEXT):
                try:
                    cells.append(
                        f"{1e3 * seconds(*operands(options.batch, keys), width, backend, options.repeats):.2f}"
                    )
                except RuntimeError:  # no kernel of this backend takes it
                    cells.append("")
            lines.append(f"| {name} | {width} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    measure.write("attention", lines)


if __name__ == "__main__":
    main()
