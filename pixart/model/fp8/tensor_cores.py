"""FP8 GEMMs on tensor cores, in the operand layouts that a GPU supports."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Major compute capability of GPUs whose FP8 GEMMs accept both layouts of each operand (B200, B300). Earlier GPUs
# (8.9, 9.0) and the consumer GPUs of the same generation (12.x) require a row-major a and a column-major b.
ANY_LAYOUT_CAPABILITY = 10


def accepts_any_layout() -> bool:
    """Return whether FP8 GEMMs of the current GPU accept both layouts of each operand."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).major == ANY_LAYOUT_CAPABILITY


@torch.library.custom_op("pixart::tensor_core_gemm", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def tensor_core_gemm(
    a: Tensor,
    b: Tensor,
    transposed_a: bool,
    transposed_b: bool,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    fast_accum: bool,
) -> Tensor:
    """Return FP8 a (m, k) times FP8 b (k, n), times both scales, plus bias (n,) -> (m, n).

    A `transposed` operand is passed as its transpose; all tensors are contiguous.

    This is a custom operator because torch's operator requires reductions along rows even on GPUs that do not. It is
    opaque to the compiler where a transposed copy fused into a row-wise cast would write single bytes with a stride of
    one row; `register_lowering` compiles it into a direct call of torch's operator on other GPUs.
    """
    a, b = a.contiguous(), b.contiguous()  # the compiler may choose another layout
    if not accepts_any_layout():
        a, transposed_a = (transpose_copy(a) if transposed_a else a), False
        b, transposed_b = (b if transposed_b else transpose_copy(b)), True
    a, b = (a.t() if transposed_a else a), (b.t() if transposed_b else b)
    return torch._scaled_mm(
        a, b, scale_a=scale_a, scale_b=scale_b, bias=bias, out_dtype=dtype, use_fast_accum=fast_accum
    )


@tensor_core_gemm.register_fake
def _(a, b, transposed_a, transposed_b, scale_a, scale_b, bias, dtype, fast_accum):
    assert bias is None or bias.dtype == dtype  # cuBLAS requires it
    return a.new_empty(a.shape[transposed_a], b.shape[1 - transposed_b], dtype=dtype)


def transpose_copy(x: Tensor) -> Tensor:
    """Return the contiguous transpose of x (m, n) -> (n, m), by a compiled kernel: tiled, unlike an eager copy."""
    return compiled_transpose_copy()(x)


@functools.cache
def compiled_transpose_copy() -> Callable[[Tensor], Tensor]:
    """Return the compiled function, made at its first use because that imports the compiler, which takes a second."""
    return torch.compile(lambda x: x.t().contiguous(), dynamic=True)


@torch.library.custom_op("pixart::join_columns", mutates_args=())
def join_columns(parts: list[Tensor]) -> Tensor:
    """Concatenate FP8 matrices (rows, columns) along their columns.

    The compiler would cast all parts of a concatenation in one kernel, which reads each part again after the kernel
    that finds its largest magnitude. Compiled by `register_lowerings`, each part is cast in the kernel that reduces it.
    """
    return torch.cat(parts, -1)


@join_columns.register_fake
def _(parts):
    return parts[0].new_empty(parts[0].shape[0], sum(part.shape[1] for part in parts))


@functools.cache
def register_lowerings() -> None:
    """Register how the compiler generates code for `tensor_core_gemm` and `join_columns`.

    GEMMs become calls of `torch._scaled_mm` on GPUs that accept any layout: the generated code then calls cuBLAS
    without the dispatch of a Python operator. Other GPUs keep the opaque operator. Call this before a model is
    compiled; it imports the compiler, which takes a second.
    """
    from torch._inductor import ir, lowering
    from torch._inductor.kernel.mm import aten__fp8_mm

    operator = torch.ops.pixart.tensor_core_gemm.default
    opaque = lowering.fallback_handler(operator, add_to_fallback_set=False)

    def in_layout(operand: Any, transposed: bool) -> Any:
        operand.realize()  # else each GEMM of the operand would cast it anew
        realized = ir.ExternKernel.require_contiguous(operand)
        return lowering.permute(realized, [1, 0]) if transposed else realized

    def lower(a, b, transposed_a, transposed_b, scale_a, scale_b, bias, dtype, fast_accum):
        if not accepts_any_layout():
            return opaque(a, b, transposed_a, transposed_b, scale_a, scale_b, bias, dtype, fast_accum)
        a, b = in_layout(a, transposed_a), in_layout(b, transposed_b)
        rows, columns = a.get_size()[0], b.get_size()[1]
        layout = ir.FixedLayout(a.get_device(), dtype, [rows, columns])
        others = [ir.ExternKernel.realize_input(other) for other in (scale_a, scale_b, bias) if other is not None]
        call = aten__fp8_mm.bind([a, b, *others], layout, out_dtype=dtype, use_fast_accum=fast_accum)
        return call.output_node()

    def lower_join(parts):
        for part in parts:
            part.realize()
        return ir.TensorBox(ir.ConcatKernel.create(parts, 1))

    lowering.register_lowering(operator, type_promotion_kind=None)(lower)
    lowering.register_lowering(torch.ops.pixart.join_columns.default, type_promotion_kind=None)(lower_join)
