"""The model's products, BF16 against FP8: alone, and with the casts of what they multiply.

    python -m benchmarks.gemm [--batch 320] [--dim 1152]

prints the table and writes it to `benchmarks/results/`. Each product stands for itself and for the two of the way back.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import measure
from pixart.model.device_timer import median_seconds
from pixart.model.fp8.ops import E4M3, E5M2, Format, quantize, scaled_matmul

TOKENS, TEXT, TEXT_DIM = 256, 120, 2048


def shapes(batch: int, dim: int) -> dict[str, tuple[int, int, int]]:
    """rows, inputs and outputs of each linear of a block."""
    rows = batch * TOKENS
    return {
        "q, k, v together": (rows, dim, 3 * dim),
        "q, k or v alone": (rows, dim, dim),
        "keys and values of the text": (batch * TEXT, TEXT_DIM, 2 * dim),
        "linear1": (rows, dim, 4 * dim),
        "linear2": (rows, 4 * dim, dim),
    }


def products(rows: int, inputs: int, outputs: int) -> dict[str, tuple[Tensor, Tensor, Format, bool]]:
    """Both operands of the three products of a linear, the format of the first, and whether bits may be saved."""
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
    """Return the cells of one product: its rates, and the ratios of FP8's to BF16's."""
    scale = torch.full((), 8.0, device=a.device)
    a8, b8 = quantize(a, scale, fmt), quantize(b, scale, E4M3)

    def alone(a8: Tensor, b8: Tensor) -> Tensor:
        return scaled_matmul(a8, b8, scale, scale, torch.bfloat16, bias=None, fast_accum=fast)

    def with_casts(a: Tensor, b: Tensor) -> Tensor:
        return alone(quantize(a, scale, fmt), quantize(b, scale, E4M3))

    ways: list[Callable[[], object]] = [lambda: a @ b]
    for way, given in ((alone, (a8, b8)), (with_casts, (a, b))):
        compiled = torch.compile(way, fullgraph=True)
        ways.append(lambda compiled=compiled, given=given: compiled(*given))
    operations = 2 * a.shape[0] * a.shape[1] * b.shape[1] / 1e12
    plain, fp8, cast = (operations / median_seconds(way, repeats) for way in ways)
    return [f"{plain:.3g}", f"{fp8:.3g}", f"{cast:.3g}", f"{fp8 / plain:.3g}", f"{cast / plain:.3g}"]


def main() -> None:
    parser = measure.parser(__doc__, repeats=20)
    parser.add_argument("--dim", type=int, default=1152)
    options = parser.parse_args()
    heading = [
        f"# The products of a block, batch {options.batch}, width {options.dim}, on {measure.card()}",
        "",
        f"torch {torch.__version__}. Transposed copies that the card's FP8 products want count as part of these.",
        *([] if torch.cuda.is_available() else ["", "Here FP8 is emulated: of a GPU the ratios say nothing."]),
    ]
    columns = ["product", "BF16, TFLOP/s", "FP8 alone", "FP8 with casts", "alone / BF16", "with casts / BF16"]
    page = measure.Page(options.out, "gemm", heading, columns)
    for linear, sizes in shapes(options.batch, options.dim).items():
        for name, operands in products(*sizes).items():
            try:
                page.row(f"{linear}, {name}", *row(*operands, options.repeats))
            except RuntimeError as error:  # too little memory, or a product that the card does not have
                page.failed(f"{linear}, {name}", error)
            torch._dynamo.reset()


if __name__ == "__main__":
    main()
