"""FP8 formats, casts, and the GEMMs of a linear in FP8: on tensor cores on a GPU, emulated on a CPU.

The emulation rounds values to the FP8 grid and multiplies them in float32, which gives the same result up to the order
of summation. Nothing here synchronizes with the device, and torch.compile traces it without graph breaks: scales are
known in advance, so that a cast is fused into the kernel that produces its tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pixart.model.fp8.tensor_cores import join_columns, tensor_core_gemm


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
    a: Tensor,
    b: Tensor,
    inverse_a: Tensor,
    inverse_b: Tensor,
    dtype: torch.dtype,
    *,
    bias: Tensor | None,
    fast_accum: bool,
) -> Tensor:
    """Return quantized a (m, k) times quantized b (k, n), times the inverses () of both scales, plus bias -> (m, n).

    Each of a and b is contiguous or the transpose of a contiguous tensor. `fast_accum` accumulates at lower precision
    on a GPU, which is customary in the forward pass and not in the backward pass.
    """
    if not uses_tensor_cores(a):
        unscale = inverse_a * inverse_b
        if b.numel() < a.shape[0] * b.shape[1]:  # unscale the smaller of b and the result
            scaled = b * unscale
            return cast(a @ scaled if bias is None else torch.addmm(bias.float(), a, scaled), dtype)
        result = a @ b * unscale
        return cast(result if bias is None else result + bias, dtype)
    fuse_bias = bias is not None and dtype != torch.float32  # cuBLAS has no bias for float32 results
    transposed = (not a.is_contiguous(), not b.is_contiguous())
    operands = [
        tensor.t() if is_transposed else tensor for tensor, is_transposed in zip((a, b), transposed, strict=True)
    ]
    bias = bias if bias is None else bias.to(dtype)  # under autocast the bias is still float32
    result = tensor_core_gemm(
        *operands, *transposed, inverse_a, inverse_b, bias if fuse_bias else None, dtype, fast_accum
    )
    return result if fuse_bias or bias is None else result + bias


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in `dtype`, x itself if it has that type.

    Up to torch 2.11 a compiled `autograd.Function` whose forward ends in a `Tensor.to` that changes nothing returns
    the alias of an intermediate value, which has no gradient: all gradients behind it become zero.
    """
    return x if x.dtype == dtype else x.to(dtype)


class Float8LinearFunction(torch.autograd.Function):
    """x (rows, in) times weight (out, in) transposed plus bias (out,), with all three GEMMs of a step in FP8.

    `weight` may be the concatenated weights of several linears with `out_features` rows each. The result is a tuple of
    each linear's output, so that the gradient of each is cast by the kernel that produces it. `scales` (linears, 3) are
    theirs by slot: tensors of one GEMM share a scale, the smallest, which clips none of them. `staged` are their staged
    amax (3,), which the backward pass updates. `weight8` is the weight in FP8 with the shared scale if FSDP2 has
    gathered it so; the gradient is that of `weight`, whose values are not read then. `high_precision_grad_weight`
    computes the weight gradient in the input's precision.
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
    ) -> tuple[Tensor, ...]:
        scale = scales.amin(0)
        inverse = scale.reciprocal()
        x8 = quantize(x, scale[INPUT], E4M3)
        if weight8 is None:
            weight8 = quantize(weight, scale[WEIGHT], E4M3)
        elif not uses_tensor_cores(weight8):
            weight8 = weight8.float()
        ctx.save_for_backward(x if high_precision_grad_weight else x8, weight8, scale, inverse)
        ctx.out_features, ctx.staged, ctx.dtypes = out_features, staged, (x.dtype, weight.dtype)
        ctx.high_precision_grad_weight = high_precision_grad_weight
        result = scaled_matmul(x8, weight8.t(), inverse[INPUT], inverse[WEIGHT], x.dtype, bias=bias, fast_accum=True)
        return result.split(out_features, dim=-1)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight8, scale, inverse = ctx.saved_tensors  # x is quantized, unless the weight gradient is not
        x_dtype, weight_dtype = ctx.dtypes
        for staged, grad in zip(ctx.staged, grads, strict=True):
            update_amax(staged, GRAD_OUTPUT, amax(grad))
        needs_x, needs_weight, _, needs_bias, *_ = ctx.needs_input_grad  # text embeddings need no gradient
        parts = [quantize(grad, scale[GRAD_OUTPUT], E5M2) for grad in grads]
        grad8 = join_columns(parts) if len(parts) > 1 and uses_tensor_cores(grads[0]) else concatenate(parts, dim=-1)
        grad_x = grad_weight = None
        if needs_x:
            grad_x = scaled_matmul(
                grad8, weight8, inverse[GRAD_OUTPUT], inverse[WEIGHT], x_dtype, bias=None, fast_accum=False
            )
        if needs_weight and ctx.high_precision_grad_weight:
            grad_weight = (concatenate(grads, dim=-1).t() @ x).to(weight_dtype)
        elif needs_weight:
            grad_weight = scaled_matmul(
                grad8.t(), x, inverse[GRAD_OUTPUT], inverse[INPUT], weight_dtype, bias=None, fast_accum=False
            )
        grad_bias = concatenate([grad.sum(0) for grad in grads]) if needs_bias else None
        return grad_x, grad_weight, None, grad_bias, *[None] * (3 + len(ctx.staged))


def concatenate(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Concatenate along a dimension; a single tensor is returned without a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
