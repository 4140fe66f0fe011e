"""FP8 formats, casts, and the GEMMs of a linear in FP8: on tensor cores on a GPU, emulated on a CPU.

The emulation rounds values to the FP8 grid and multiplies them in float32, which gives the same result up to the order
of summation. Nothing here synchronizes with the device, and torch.compile traces it without graph breaks: scales are
known in advance, so that a cast is fused into the kernel that produces its tensor.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """FP8 format of the OCP specification (revision 1.0, section 4)."""

    dtype: torch.dtype
    max: float
    mantissa_bits: int
    min_exponent: int  # of the smallest normal number


E4M3 = Format(dtype=torch.float8_e4m3fn, max=448.0, mantissa_bits=3, min_exponent=-6)
E5M2 = Format(dtype=torch.float8_e5m2, max=57344.0, mantissa_bits=2, min_exponent=-14)

INPUT, WEIGHT, GRAD_OUTPUT = range(3)
SLOTS = ("input", "weight", "grad_output")
FORMATS = (E4M3, E4M3, E5M2)

CHUNK_SIZE = 1 << 15  # float32 values per thread: a fraction of a core's cache
# Major compute capability of GPUs whose FP8 GEMMs accept both layouts of each operand (B200, B300). Earlier GPUs
# (8.9, 9.0) and the consumer GPUs of the same generation (12.x) require a row-major a and a column-major b.
ANY_LAYOUT_CAPABILITY = 10


def uses_tensor_cores(x: Tensor) -> bool:
    """Return whether GEMMs of this tensor run in FP8 on hardware; they are emulated otherwise."""
    return x.is_cuda


def quantize(x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """Return x * scale, saturated and rounded to `fmt`: an FP8 tensor on a GPU, its exact float32 values on a CPU."""
    if uses_tensor_cores(x):
        return (x.float() * scale).clamp(-fmt.max, fmt.max).to(fmt.dtype)
    if scale.dim() or torch.compiler.is_compiling():  # the compiler fuses the operations into one pass
        return round_to_format_((x.float() * scale).clamp_(-fmt.max, fmt.max), fmt)
    quantized = torch.empty(x.shape)
    size = CHUNK_SIZE * torch.get_num_threads()
    for out, values in zip(quantized.view(-1).split(size), x.detach().reshape(-1).split(size), strict=True):
        round_to_format_(torch.mul(values.float(), scale, out=out).clamp_(-fmt.max, fmt.max), fmt)
    return quantized


def round_to_format_(x: Tensor, fmt: Format) -> Tensor:
    """Round float32 values within the range of `fmt` to its grid, half to even, like a cast and back; in place.

    Adding and subtracting 1.5 * 2**(e + 23 - m), for a value of exponent e and a format of m mantissa bits, keeps
    exactly those m bits. A cast to FP8 on a CPU takes three times as long.
    """
    exponent = (x.view(torch.int32) & 0x7F80_0000).clamp_(min=(fmt.min_exponent + 127) << 23)
    magic = exponent.add_(((23 - fmt.mantissa_bits) << 23) | 0x0040_0000).view(torch.float32)
    return x.add_(magic).sub_(magic)


def fake_quantize(x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """Quantize and dequantize x, in float32."""
    return quantize(x, scale, fmt).float() / scale


def amax(x: Tensor) -> Tensor:
    """Return the largest magnitude of x in float32 -> (); NaN if any value is NaN."""
    if uses_tensor_cores(x) or torch.compiler.is_compiling():  # by rows, to be fused with a normalization's kernel
        return x.detach().abs().amax(-1).amax().float()
    low, high = torch.aminmax(x.detach())
    return torch.maximum(-low, high).float()


def update_amax(staged: Tensor, slot: int, value: Tensor) -> None:
    """Set `staged[slot]` to the maximum of itself and `value`."""
    staged[slot] = torch.maximum(staged[slot], value)


def scaled_matmul(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, *, bias: Tensor | None, fast_accum: bool
) -> Tensor:
    """Return quantized a (m, k) times quantized b (k, n), divided by both scales, plus bias (n,) -> (m, n).

    Each of a and b is contiguous or the transpose of a contiguous tensor. A scale is one number, one per row of a
    (m, 1), or one per column of b (n,). `fast_accum` accumulates at lower precision on a GPU, which is customary in the
    forward pass and not in the backward pass.
    """
    unscale = (scale_a * scale_b).reciprocal()
    if not uses_tensor_cores(a):
        if unscale.dim() < 2 and b.numel() < a.shape[0] * b.shape[1]:  # unscale the smaller of b and the result
            scaled = b * unscale
            return cast(a @ scaled if bias is None else torch.addmm(bias.float(), a, scaled), dtype)
        result = a @ b * unscale
        return cast(result if bias is None else result + bias, dtype)
    per_tensor = unscale.dim() == 0
    one = torch.ones((), device=a.device)
    fuse_bias = per_tensor and bias is not None and dtype != torch.float32  # cuBLAS has no bias for float32 results
    inverse_scales = (scale_a.reciprocal(), scale_b.reciprocal()) if per_tensor else (one, one)
    transposed = (not a.is_contiguous(), not b.is_contiguous())
    operands = [
        tensor.t() if is_transposed else tensor for tensor, is_transposed in zip((a, b), transposed, strict=True)
    ]
    bias = bias if bias is None else bias.to(dtype)  # under autocast the bias is still float32
    result = tensor_core_gemm(*operands, *transposed, *inverse_scales, bias if fuse_bias else None, dtype, fast_accum)
    if not per_tensor:
        result = cast(result * unscale, dtype)
    return result if fuse_bias or bias is None else result + bias


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in `dtype`, x itself if it has that type.

    Up to torch 2.11 a compiled `autograd.Function` whose forward ends in a `Tensor.to` that changes nothing returns
    the alias of an intermediate value, which has no gradient: all gradients behind it become zero.
    """
    return x if x.dtype == dtype else x.to(dtype)


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

    This is a custom operator, opaque to the compiler, because torch's operator requires reductions along rows even
    on GPUs that do not, and because a transposed copy fused into a row-wise cast would write single bytes with a stride
    of one row.
    """
    a, b = a.contiguous(), b.contiguous()  # the compiler may choose another layout
    if torch.cuda.get_device_properties(a.device).major != ANY_LAYOUT_CAPABILITY:
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


class Float8LinearFunction(torch.autograd.Function):
    """x (rows, in) times weight (out, in) transposed plus bias (out,), with all three GEMMs of a step in FP8.

    `weight` may be the concatenated weights of several linears with `out_features` rows each; `scales` (linears, 3) are
    theirs by slot, and `staged` are their staged amax (3,), which the backward pass updates. All use the input scale of
    the first one. `weight8` is the weight in FP8 if FSDP2 has gathered it so; the gradient is that of `weight`, whose
    values are not read then. `high_precision_grad_weight` computes the weight gradient in the input's precision.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        weight8: Tensor | None,
        bias: Tensor | None,
        scales: Tensor,
        out_features: tuple[int, ...],
        high_precision_grad_weight: bool,
        *staged: Tensor,
    ) -> Tensor:
        x8, weight_scale = quantize(x, scales[0, INPUT], E4M3), repeat_scales(scales[:, WEIGHT], out_features)
        if weight8 is None:
            weight8 = quantize(weight, weight_scale if len(out_features) == 1 else weight_scale.unsqueeze(-1), E4M3)
        elif not uses_tensor_cores(weight8):
            weight8 = weight8.float()
        ctx.save_for_backward(x if high_precision_grad_weight else x8, weight8, scales)
        ctx.out_features, ctx.staged, ctx.dtypes = out_features, staged, (x.dtype, weight.dtype)
        ctx.high_precision_grad_weight = high_precision_grad_weight
        return scaled_matmul(x8, weight8.t(), scales[0, INPUT], weight_scale, x.dtype, bias=bias, fast_accum=True)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight8, scales = ctx.saved_tensors  # x is quantized, except for a high-precision weight gradient
        x_dtype, weight_dtype = ctx.dtypes
        for staged, part in zip(ctx.staged, grad.split(ctx.out_features, dim=-1), strict=True):
            update_amax(staged, GRAD_OUTPUT, amax(part))
        needs_x, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad  # text embeddings need no gradient
        single = len(ctx.out_features) == 1
        grad_scale, weight_scale = scales[0, GRAD_OUTPUT], scales[0, WEIGHT]
        if not single:  # the sum over all outputs needs a common product of scales: the smallest, which clips nothing
            products = scales[:, GRAD_OUTPUT] * scales[:, WEIGHT]
            grad_scale = repeat_scales(scales[:, GRAD_OUTPUT] * (products.min() / products), ctx.out_features)
            weight_scale = products.min()
        grad8 = quantize(grad, grad_scale, E5M2)
        grad_x = grad_weight = None
        if needs_x:
            scale = grad_scale if single else torch.ones_like(weight_scale)
            grad_x = scaled_matmul(grad8, weight8, scale, weight_scale, x_dtype, bias=None, fast_accum=False)
        if needs_weight and ctx.high_precision_grad_weight:
            grad_weight = (grad.t() @ x).to(weight_dtype)
        elif needs_weight:
            row_scale = grad_scale if single else grad_scale.unsqueeze(-1)
            grad_weight = scaled_matmul(
                grad8.t(), x, row_scale, scales[0, INPUT], weight_dtype, bias=None, fast_accum=False
            )
        return grad_x, grad_weight, None, grad.sum(0) if needs_bias else None, *[None] * (3 + len(ctx.staged))


def repeat_scales(scales: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return a single scale as a scalar (); repeat each of several scales by its size -> (sum of sizes,)."""
    if len(sizes) == 1:
        return scales[0]
    return torch.cat([scale.expand(size) for scale, size in zip(scales, sizes, strict=True)])
