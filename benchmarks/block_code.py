"""Count the work of the code that torch.compile generates for one transformer block, per precision, without a GPU.

    python -m benchmarks.block_code [--batch 64] [--out FOLDER]

The command requires torch's CUDA build. For the forward and backward pass of one full-size block it lists the kernel
launches by kind, the bytes that generated kernels read and write, the bytes of the transposed copies that FP8 GEMMs
require on some GPUs, both in units of one BF16 tensor of all tokens, and the floating-point operations of the GEMMs by
precision. No time is measured and no throughput is assumed.
"""

import torch

from benchmarks import measure
from benchmarks.generated_code import total
from benchmarks.lowering import lower_module, pretend
from conversion.calibration.plan import make_plan
from pixart.model.dit import DiT
from pixart.model.fp8 import linear

DIM, TOKENS, TEXT, TEXT_DIM = 1152, 256, 120, 2048
VARIANTS = {
    "BF16": {},
    "FP8 native": {"fp8": True},
    "FP8 native, weight gradient in BF16": {"fp8": True, "precise": True},
}
COLUMNS = ["variant", "generated kernels", "GEMMs", "attention", "other calls", "units moved", "units transposed"]
COLUMNS += ["TFLOP in FP8", "TFLOP in BF16"]


def block(batch: int, *, fp8: bool = False, precise: bool = False) -> torch.nn.Module:
    """Return one block with BF16 parameters, as FSDP2 gathers them for a pass.

    `fp8` replaces its planned linears by FP8 ones, and `precise` computes their weight gradients in BF16.
    """
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
    """Return tokens (B, N, D), modulation (B, 6 D), text (B, L, text_dim) and mask (B, L).

    Only the first two require gradients.
    """
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
    for name, settings in VARIANTS.items():
        arguments = inputs(options.batch)
        unit = arguments[0].numel() * 2
        work = total([lowered.work for lowered in lower_module(block(options.batch, **settings), *arguments)])
        page.row(
            name,
            *(str(work.launches[kind]) for kind in ("generated", "gemms", "attention", "other")),
            f"{work.generated_bytes / unit:.1f}",
            f"{work.transposed_bytes / unit:.1f}",
            *(f"{work.operations[precision] / 1e12:.3f}" for precision in ("fp8", "bf16")),
        )


if __name__ == "__main__":
    main()
