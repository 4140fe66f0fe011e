"""Benchmark the model's GEMMs in FP8 against BF16, without and with the casts of their operands.

    python -m benchmarks.gemm [--batch 320] [--dim 1152]

The command prints a table and writes it to `benchmarks/results/`. Each linear has three rows: the forward GEMM and both
GEMMs of the backward pass.
"""

from argparse import Namespace
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import measure
from pixart.gpu_rates import FP8_CARDS, linear_seconds
from pixart.model.device_timer import median_seconds
from pixart.model.fp8.ops import E4M3, E5M2, Format, quantize, scaled_matmul

TOKENS, TEXT, TEXT_DIM = 256, 120, 2048


def shapes(batch: int, dim: int) -> dict[str, tuple[int, int, int]]:
    """Return (rows, in features, out features) of each linear of a block, by its label in the table."""
    rows = batch * TOKENS
    return {
        "q, k, v fused": (rows, dim, 3 * dim),
        "q, k or v separate": (rows, dim, dim),
        "keys and values of the text": (batch * TEXT, TEXT_DIM, 2 * dim),
        "linear1": (rows, dim, 4 * dim),
        "linear2": (rows, 4 * dim, dim),
    }


def gemms(rows: int, inputs: int, outputs: int) -> dict[str, tuple[Tensor, Tensor, Format, bool]]:
    """Return the operands of a linear's three GEMMs, by name.

    Each value is a BF16 a (m, k), a BF16 b (k, n), the FP8 format of a (b is E4M3), and whether the GEMM uses fast
    accumulation.
    """
    device = measure.device()
    x = torch.randn(rows, inputs, device=device, dtype=torch.bfloat16)
    weight = torch.randn(outputs, inputs, device=device, dtype=torch.bfloat16)
    grad = torch.randn(rows, outputs, device=device, dtype=torch.bfloat16)
    return {
        "forward": (x, weight.t(), E4M3, True),
        "gradient of the input": (grad, weight, E5M2, False),
        "gradient of the weight": (grad.t(), x, E5M2, False),
    }


def row(a: Tensor, b: Tensor, fmt: Format, fast: bool, repeats: int) -> list[str]:
    """Benchmark one GEMM and return the cells of its row.

    The cells are TFLOP/s in BF16, in FP8 and in FP8 with casts, then the ratios of both FP8 figures to BF16's.
    """
    scale = torch.full((), 8.0, device=a.device)
    a8, b8 = quantize(a, scale, fmt), quantize(b, scale, E4M3)

    def gemm(a8: Tensor, b8: Tensor) -> Tensor:
        return scaled_matmul(a8, b8, 1 / scale, 1 / scale, torch.bfloat16, bias=None, fast_accum=fast)

    def with_casts(a: Tensor, b: Tensor) -> Tensor:
        return gemm(quantize(a, scale, fmt), quantize(b, scale, E4M3))

    variants: list[Callable[[], object]] = [lambda: a @ b]
    for function, operands in ((gemm, (a8, b8)), (with_casts, (a, b))):
        compiled = torch.compile(function, fullgraph=True)
        variants.append(lambda compiled=compiled, operands=operands: compiled(*operands))
    operations = 2 * a.shape[0] * a.shape[1] * b.shape[1] / 1e12
    plain, fp8, cast = (operations / median_seconds(function, repeats) for function in variants)
    return [f"{plain:.3g}", f"{fp8:.3g}", f"{cast:.3g}", f"{fp8 / plain:.3g}", f"{cast / plain:.3g}"]


def rooflines(options: Namespace) -> None:
    """Write a table by linear of the least time in BF16 and in FP8 with casts on `options.card`."""
    heading = [
        f"# Rooflines of a block's linears, batch {options.batch}, width {options.dim}, {options.card}",
        "",
        "Nothing is measured: peak rates and bandwidths of the data sheet, the three GEMMs of a training step.",
    ]
    columns = ["linear", "rows x inputs x outputs", "BF16, ms", "FP8 with casts, ms", "BF16 / FP8"]
    page = measure.Page(options.out, f"gemm-{options.card}", heading, columns)
    for linear, sizes in shapes(options.batch, options.dim).items():
        bf16, fp8 = linear_seconds(options.card, *sizes)
        size = " x ".join(map(str, sizes))
        page.row(linear, size, f"{bf16 * 1e3:.3f}", f"{fp8 * 1e3:.3f}", f"{bf16 / fp8:.2f}")


def main() -> None:
    parser = measure.parser(__doc__, repeats=20)
    parser.add_argument("--dim", type=int, default=1152)
    parser.add_argument("--card", choices=list(FP8_CARDS), help="Print the rooflines of this GPU; measure nothing.")
    options = parser.parse_args()
    if options.card:
        rooflines(options)
        return
    heading = [
        f"# GEMMs of a block, batch {options.batch}, width {options.dim}, on {measure.device_name()}",
        "",
        f"torch {torch.__version__}. Transposed copies that FP8 GEMMs require on this GPU are included.",
        *([] if torch.cuda.is_available() else ["", "FP8 is emulated here; the ratios do not apply to a GPU."]),
    ]
    columns = ["GEMM", "BF16, TFLOP/s", "FP8 without casts", "FP8 with casts", "without / BF16", "with casts / BF16"]
    page = measure.Page(options.out, "gemm", heading, columns)
    for linear, sizes in shapes(options.batch, options.dim).items():
        for name, operands in gemms(*sizes).items():
            try:
                page.row(f"{linear}, {name}", *row(*operands, options.repeats))
            except RuntimeError as error:  # out of memory, or the GPU does not support the GEMM
                page.failed(f"{linear}, {name}", error)
            torch._dynamo.reset()


if __name__ == "__main__":
    main()
