"""Check the FP8 GEMMs of a linear against float64, with every combination of operands, layouts and scales in training.

    python -m benchmarks.gemm_accuracy [--tiny]

The relative error of an FP8 GEMM is due to the rounding of its result to BF16 and to the order of summation. An error
above LIMIT means that a layout, a scale or the accumulation is wrong; the command then returns 1. It also measures the
throughput of the transposed copies that FP8 GEMMs require on GPUs of other compute capabilities than 10.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import measure
from pixart.model.device_timer import median_seconds
from pixart.model.fp8.ops import E4M3, E5M2, quantize, scaled_matmul, transpose_copy

SHAPES = ((512, 1152, 3456), (1024, 4608, 1152), (48, 1152, 4608))  # rows, inputs, outputs
TINY = ((32, 48, 64),)
COPIES = ((81920, 1152), (81920, 4608))
LIMIT = 6e-3
SCALE = 8.0


def gemms(rows: int, inputs: int, outputs: int) -> dict[str, tuple[Callable[[], Tensor], Tensor]]:
    """Return the FP8 GEMMs of a linear by name, each with its float64 result for the same FP8 operands."""
    torch.manual_seed(0)
    device = measure.device()
    x, w, g = (torch.randn(s, device=device).bfloat16() for s in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    bias = torch.randn(outputs, device=device).bfloat16()
    scale = torch.tensor(SCALE, device=device)
    inverse = scale.reciprocal()
    x8, w8, g8 = quantize(x, scale, E4M3), quantize(w, scale, E4M3), quantize(g, scale, E5M2)
    exact_x, exact_w, exact_g = (tensor.double() / scale.double() for tensor in (x8, w8, g8))
    bf16 = torch.bfloat16
    return {
        "forward, with bias": (
            lambda: scaled_matmul(x8, w8.t(), inverse, inverse, bf16, bias=bias, fast_accum=True),
            exact_x @ exact_w.t() + bias.double(),
        ),
        "gradient of the input": (
            lambda: scaled_matmul(g8, w8, inverse, inverse, bf16, bias=None, fast_accum=False),
            exact_g @ exact_w,
        ),
        "gradient of the weight": (
            lambda: scaled_matmul(g8.t(), x8, inverse, inverse, bf16, bias=None, fast_accum=False),
            exact_g.t() @ exact_x,
        ),
        "gradient of the weight, in float32": (
            lambda: scaled_matmul(g8.t(), x8, inverse, inverse, torch.float32, bias=None, fast_accum=False),
            exact_g.t() @ exact_x,
        ),
    }


def main() -> int:
    parser = measure.parser(__doc__, repeats=20)
    parser.add_argument("--tiny", action="store_true", help="Use small shapes, as a smoke test.")
    options = parser.parse_args()
    heading = [f"# FP8 GEMMs against float64, on {measure.device_name()}", "", f"torch {torch.__version__}"]
    page = measure.Page(
        options.out, "gemm-accuracy", heading, ["GEMM", "rows x inputs x outputs", "relative error", ""]
    )
    num_wrong = 0
    for shape in TINY if options.tiny else SHAPES:
        for name, (gemm, exact) in gemms(*shape).items():
            try:
                error = float((gemm().double() - exact).norm() / exact.norm())
            except RuntimeError as reason:
                page.failed(name, reason)
                num_wrong += 1
                continue
            is_right = error < LIMIT
            num_wrong += not is_right
            page.row(name, "x".join(map(str, shape)), f"{error:.2e}", "" if is_right else "WRONG")
    if torch.cuda.is_available():
        page.note("Transposed copies, GB/s read and written:", "")
        for shape in TINY if options.tiny else COPIES:
            matrix = torch.randn(shape, device="cuda").to(E4M3.dtype)
            is_equal = torch.equal(transpose_copy(matrix).view(torch.uint8), matrix.view(torch.uint8).t().contiguous())
            num_wrong += not is_equal
            variants = {
                "compiled": lambda matrix=matrix: transpose_copy(matrix),
                "eager": lambda matrix=matrix: matrix.t().contiguous(),
            }
            rates = [
                f"{variant} {2 * matrix.numel() / median_seconds(run, 20) / 1e9:.0f}"
                for variant, run in variants.items()
            ]
            page.note(f"- {shape[0]}x{shape[1]}: {', '.join(rates)}{'' if is_equal else '; WRONG'}")
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
