"""Check the FP8 GEMMs of a linear against float64, with every combination of operands, layouts and scales in training.

    python -m benchmarks.products [--tiny]

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


def products(rows: int, inputs: int, outputs: int) -> dict[str, tuple[Callable[[], Tensor], Tensor]]:
    """Return the FP8 GEMMs of a linear by name, each with its float64 result for the same FP8 operands."""
    torch.manual_seed(0)
    device = measure.device()
    x, w, g = (torch.randn(s, device=device).bfloat16() for s in ((rows, inputs), (outputs, inputs), (rows, outputs)))
    bias = torch.randn(outputs, device=device).bfloat16()
    one, each = torch.tensor(SCALE, device=device), torch.linspace(4, 16, outputs, device=device)
    x8, w8, g8 = quantize(x, one, E4M3), quantize(w, one, E4M3), quantize(g, one, E5M2)
    w8_each = quantize(w, each[:, None], E4M3)
    exact_x, exact_w, exact_g = (tensor.double() / one.double() for tensor in (x8, w8, g8))
    exact_w_each = w8_each.double() / each.double()[:, None]
    bf16 = torch.bfloat16
    return {
        "forward, with bias": (
            lambda: scaled_matmul(x8, w8.t(), one, one, bf16, bias=bias, fast_accum=True),
            exact_x @ exact_w.t() + bias.double(),
        ),
        "forward, a scale for each output": (
            lambda: scaled_matmul(x8, w8_each.t(), one, each, bf16, bias=bias, fast_accum=True),
            exact_x @ exact_w_each.t() + bias.double(),
        ),
        "gradient of the input": (
            lambda: scaled_matmul(g8, w8, one, one, bf16, bias=None, fast_accum=False),
            exact_g @ exact_w,
        ),
        "gradient of the weight": (
            lambda: scaled_matmul(g8.t(), x8, one, one, bf16, bias=None, fast_accum=False),
            exact_g.t() @ exact_x,
        ),
        "gradient of the weight, in float32": (
            lambda: scaled_matmul(g8.t(), x8, one, one, torch.float32, bias=None, fast_accum=False),
            exact_g.t() @ exact_x,
        ),
    }


def main() -> int:
    parser = measure.parser(__doc__, repeats=20)
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see whether it runs")
    options = parser.parse_args()
    heading = [f"# FP8 products against float64, on {measure.card()}", "", f"torch {torch.__version__}"]
    page = measure.Page(options.out, "products", heading, ["product", "rows x inputs x outputs", "relative error", ""])
    wrong = 0
    for shape in TINY if options.tiny else SHAPES:
        for name, (product, exact) in products(*shape).items():
            try:
                error = float((product().double() - exact).norm() / exact.norm())
            except RuntimeError as reason:
                page.failed(name, reason)
                wrong += 1
                continue
            right = error < LIMIT
            wrong += not right
            page.row(name, "x".join(map(str, shape)), f"{error:.2e}", "" if right else "WRONG")
    if torch.cuda.is_available():
        page.note("Transposed copies, GB/s read and written:", "")
        for shape in TINY if options.tiny else COPIES:
            given = torch.randn(shape, device="cuda").to(E4M3.dtype)
            same = torch.equal(transpose_copy(given).view(torch.uint8), given.view(torch.uint8).t().contiguous())
            wrong += not same
            ways = {
                "compiled": lambda given=given: transpose_copy(given),
                "eager": lambda given=given: given.t().contiguous(),
            }
            rates = [f"{way} {2 * given.numel() / median_seconds(run, 20) / 1e9:.0f}" for way, run in ways.items()]
            page.note(f"- {shape[0]}x{shape[1]}: {', '.join(rates)}{'' if same else '; WRONG'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
