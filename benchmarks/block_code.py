"""What the generated code of one block does on a GPU, by each way to train it, without a GPU.

    python -m benchmarks.block_code [--batch 64] [--out FOLDER]

needs torch's CUDA build. Forward and backward of one block of the real model: launches by kind, bytes that the
generated kernels read and write in units of one BF16 tensor of tokens, transposed copies for cards whose FP8 products
want them, and operations of the products by precision. No time is measured and no rate is assumed.
"""

import torch

from benchmarks import measure
from benchmarks.generated_code import total
from benchmarks.lowering import lower_module, pretend
from conversion.calibration.plan import make_plan
from pixart.model.dit import DiT
from pixart.model.fp8 import linear

DIM, TOKENS, TEXT, TEXT_DIM = 1152, 256, 120, 2048
WAYS = {"BF16": {}, "FP8 native": {"fp8": True}, "FP8 native, weight gradient in BF16": {"fp8": True, "precise": True}}
COLUMNS = ["way", "generated kernels", "products", "attention", "other calls", "units moved", "units transposed"]
COLUMNS += ["TFLOP in FP8", "TFLOP in BF16"]


def block(batch: int, *, fp8: bool = False, precise: bool = False) -> torch.nn.Module:
    """Return one block in BF16 as FSDP2 has it when it runs, its planned linears in FP8."""
    with torch.device("meta"):
        model = DiT(dim=DIM, num_blocks=1, text_dim=TEXT_DIM)
    model.fuse_projections()
    if fp8:
        linear.swap_linears(model, make_plan(model, batch=batch), high_precision_grad_weight=precise)
    one = model.dit_blocks[0].to_empty(device="cpu")
    for parameter in one.parameters():
        parameter.data = parameter.data.bfloat16()
    return one


def inputs(batch: int) -> list[torch.Tensor]:
    """Return tokens, modulation, text and mask; only the first two have a gradient."""
    tokens = torch.empty(batch, TOKENS, DIM, dtype=torch.bfloat16).requires_grad_()
    modulation = torch.empty(batch, 6 * DIM, dtype=torch.bfloat16).requires_grad_()
    text = torch.empty(batch, TEXT, TEXT_DIM, dtype=torch.bfloat16)
    return [tokens, modulation, text, torch.empty(batch, TEXT, dtype=torch.bool)]


def main() -> None:
    parser = measure.parser(__doc__, repeats=1)
    parser.set_defaults(batch=64)
    options = parser.parse_args()
    pretend()
    heading = [f"# Generated code of a block, batch {options.batch}", "", f"torch {torch.__version__}, for an H100."]
    page = measure.Page(options.out, "block-code", heading, COLUMNS)
    for name, how in WAYS.items():
        given = inputs(options.batch)
        unit = given[0].numel() * 2
        work = total([lowered.work for lowered in lower_module(block(options.batch, **how), *given)])
        page.row(
            name,
            *(str(work.launches[kind]) for kind in ("generated", "products", "attention", "other")),
            f"{work.generated_bytes / unit:.1f}",
            f"{work.transposed_bytes / unit:.1f}",
            *(f"{work.operations[precision] / 1e12:.3f}" for precision in ("fp8", "bf16")),
        )


if __name__ == "__main__":
    main()
