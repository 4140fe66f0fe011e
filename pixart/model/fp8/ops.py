"""FP8 formats, casts, and the products of a linear in FP8: on tensor cores where there are any, else emulated.

On a CPU values are rounded to the same grid and multiplied in float32, which gives the same result up to the order of
summation. Nothing here waits for the device, and torch.compile takes it whole: scales are known beforehand, so that a
cast becomes part of the kernel that makes its tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """An FP8 format of the OCP specification (revision 1.0, section 4)."""

    dtype: torch.dtype
    max: float
    mantissa_bits: int
    min_exponent: int  # of the smallest normal number


E4M3 = Format(dtype=torch.float8_e4m3fn, max=448.0, mantissa_bits=3, min_exponent=-6)
E5M2 = Format(dtype=torch.float8_e5m2, max=57344.0, mantissa_bits=2, min_exponent=-14)

INPUT, WEIGHT, GRAD_OUTPUT = range(3)
SLOTS = ("input", "weight", "grad_output")
FORMATS = (E4M3, E4M3, E5M2)

CACHED = 1 << 15  # float32 values that a core's own cache holds several times over
# Major compute capability of the cards whose FP8 products take operands in either layout (B200, B300). Earlier cards
# (8.9, 9.0) and the consumer cards of the same generation (12.x) want the first by rows and the second by columns.
EITHER_LAYOUT = 10


def on_tensor_cores(x: Tensor) -> bool:
    """Whether products of this tensor run in FP8 on hardware; else they are emulated."""
    return x.is_cuda


def quantize(x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """x * scale, saturated and rounded to `fmt`: an FP8 tensor on a GPU, its exact float32 values on a CPU."""
    if on_tensor_cores(x):
        return (x.float() * scale).clamp(-fmt.max, fmt.max).to(fmt.dtype)
    if scale.dim() or torch.compiler.is_compiling():  # a compiler makes one pass of it
        return round_to_format_((x.float() * scale).clamp_(-fmt.max, fmt.max), fmt)
    found = torch.empty(x.shape)
    size = CACHED * torch.get_num_threads()
    for piece, own in zip(found.view(-1).split(size), x.detach().reshape(-1).split(size), strict=True):
        round_to_format_(torch.mul(own.float(), scale, out=piece).clamp_(-fmt.max, fmt.max), fmt)
    return found


def round_to_format_(x: Tensor, fmt: Format) -> Tensor:
    """Rounds float32 values within the format's range to its grid, half to even, as a cast there and back; in place.

    Adding and subtracting 1.5 * 2**(e + 23 - m), for a value of exponent e and a format of m mantissa bits, leaves
    just those m bits. A cast to FP8 on a CPU takes three times as long.
    """
    exponent = (x.view(torch.int32) & 0x7F80_0000).clamp_(min=(fmt.min_exponent + 127) << 23)
    magic = exponent.add_(((23 - fmt.mantissa_bits) << 23) | 0x0040_0000).view(torch.float32)
    return x.add_(magic).sub_(magic)


def through_fp8(x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """x as it comes out of FP8, in float32."""
    return quantize(x, scale, fmt).float() / scale


def largest(x: Tensor) -> Tensor:
    """The largest magnitude, in float32 -> (); a not-a-number wins."""
    if on_tensor_cores(x) or torch.compiler.is_compiling():  # by rows, as the kernel of a norm goes
        return x.detach().abs().amax(-1).amax().float()
    low, high = torch.aminmax(x.detach())
    return torch.maximum(-low, high).float()


def record(staged: Tensor, slot: int, amax: Tensor) -> None:
    """Raises `staged[slot]` to `amax`."""
    staged[slot] = torch.maximum(staged[slot], amax)


def scaled_matmul(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, *, bias: Tensor | None, fast: bool
) -> Tensor:
    """Quantized a (m, k) times quantized b (k, n), scales divided out, plus bias (n,) -> (m, n).

    Each of a and b is contiguous or the transpose of what is. A scale is one number, or one for each row of a (m, 1) or
    each column of b (n,). `fast` accumulates in fewer bits on a GPU, which is customary forward and not backward.
    """
    unscale = (scale_a * scale_b).reciprocal()
    if not on_tensor_cores(a):
        if unscale.dim() < 2 and b.numel() < a.shape[0] * b.shape[1]:  # scales are divided out of what is smaller
            scaled = b * unscale
            return cast(a @ scaled if bias is None else torch.addmm(bias.float(), a, scaled), dtype)
        product = a @ b * unscale
        return cast(product if bias is None else product + bias, dtype)
    whole = unscale.dim() == 0
    one = torch.ones((), device=a.device)
    fused = whole and bias is not None and dtype != torch.float32  # cuBLAS has no bias for a float32 result
    scales = (scale_a.reciprocal(), scale_b.reciprocal()) if whole else (one, one)
    turned = (not a.is_contiguous(), not b.is_contiguous())
    given = [tensor.t() if turn else tensor for tensor, turn in zip((a, b), turned, strict=True)]
    bias = bias if bias is None else bias.to(dtype)  # under autocast it is float32 still
    product = tensor_core_product(*given, *turned, *scales, bias if fused else None, dtype, fast)
    if not whole:
        product = cast(product * unscale, dtype)
    return product if fused or bias is None else product + bias


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return x in `dtype`, x itself if it has that type.

    Up to torch 2.11 a compiled `autograd.Function` whose forward ends in a `Tensor.to` that changes nothing returns
    the alias of an intermediate value, which has no gradient: all gradients behind it become zero.
    """
    return x if x.dtype == dtype else x.to(dtype)


@torch.library.custom_op("pixart::tensor_core_product", mutates_args=(), tags=(torch.Tag.flexible_layout,))
def tensor_core_product(
    a: Tensor,
    b: Tensor,
    turn_a: bool,
    turn_b: bool,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    fast: bool,
) -> Tensor:
    """FP8 a (m, k) times FP8 b (k, n), times both scales, plus bias (n,) -> (m, n). What is turned is given as its
    transpose; all that is given is contiguous.

    To a compiler it is one piece: what torch has for it insists on sums along rows also where the card does not, and a
    transposed copy that became part of a cast by rows would write single bytes a whole row apart.
    """
    a, b = a.contiguous(), b.contiguous()  # a compiler may choose
    if torch.cuda.get_device_properties(a.device).major != EITHER_LAYOUT:
        a, turn_a = (transposed(a) if turn_a else a), False
        b, turn_b = (b if turn_b else transposed(b)), True
    a, b = (a.t() if turn_a else a), (b.t() if turn_b else b)
    return torch._scaled_mm(a, b, scale_a=scale_a, scale_b=scale_b, bias=bias, out_dtype=dtype, use_fast_accum=fast)


@tensor_core_product.register_fake
def _(a, b, turn_a, turn_b, scale_a, scale_b, bias, dtype, fast):
    assert bias is None or bias.dtype == dtype  # as cuBLAS wants it
    return a.new_empty(a.shape[turn_a], b.shape[1 - turn_b], dtype=dtype)


transposed = torch.compile(lambda x: x.t().contiguous(), dynamic=True)  # in tiles, which a plain copy is not


class Float8Product(torch.autograd.Function):
    """x (rows, in) times weight (out, in) transposed plus bias (out,); all three products of a step in FP8.

    The weight may be that of several linears, one after the other, `outs` rows each; `scales` (linears, 3) are theirs
    by slot, and the `staged` amax (3,) of each is raised. All read x by the first one's scale. `weight8` is the weight
    in FP8 where it is there already; the gradient goes to `weight`, whose values are not looked at then.
    """

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        weight8: Tensor | None,
        bias: Tensor | None,
        scales: Tensor,
        outs: tuple[int, ...],
        fine_weight_gradient: bool,
        *staged: Tensor,
    ) -> Tensor:
        x8, weight_scale = quantize(x, scales[0, INPUT], E4M3), spread(scales[:, WEIGHT], outs)
        if weight8 is None:
            weight8 = quantize(weight, weight_scale if len(outs) == 1 else weight_scale.unsqueeze(-1), E4M3)
        elif not on_tensor_cores(weight8):
            weight8 = weight8.float()
        ctx.save_for_backward(x if fine_weight_gradient else x8, weight8, scales)
        ctx.outs, ctx.fine, ctx.staged, ctx.dtypes = outs, fine_weight_gradient, staged, (x.dtype, weight.dtype)
        return scaled_matmul(x8, weight8.t(), scales[0, INPUT], weight_scale, x.dtype, bias=bias, fast=True)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x8, weight8, scales = ctx.saved_tensors
        x_dtype, weight_dtype = ctx.dtypes
        for staged, part in zip(ctx.staged, grad.split(ctx.outs, dim=-1), strict=True):
            record(staged, GRAD_OUTPUT, largest(part))
        wants_x, wants_weight, _, wants_bias, *_ = ctx.needs_input_grad  # nobody asks for the text's
        grad_scale, weight_scale = scales[0, GRAD_OUTPUT], scales[0, WEIGHT]
        if len(ctx.outs) > 1:  # the sum over all outputs wants one scale of both: the smallest, which clips nothing
            both = scales[:, GRAD_OUTPUT] * scales[:, WEIGHT]
            grad_scale, weight_scale = spread(scales[:, GRAD_OUTPUT] * (both.min() / both), ctx.outs), both.min()
        grad8 = quantize(grad, grad_scale, E5M2)
        grad_x = grad_weight = None
        if wants_x:
            scale = grad_scale if len(ctx.outs) == 1 else torch.ones_like(weight_scale)
            grad_x = scaled_matmul(grad8, weight8, scale, weight_scale, x_dtype, bias=None, fast=False)
        if wants_weight and ctx.fine:
            grad_weight = (grad.t() @ x8).to(weight_dtype)
        elif wants_weight:
            by_row = grad_scale if len(ctx.outs) == 1 else grad_scale.unsqueeze(-1)
            grad_weight = scaled_matmul(grad8.t(), x8, by_row, scales[0, INPUT], weight_dtype, bias=None, fast=False)
        return grad_x, grad_weight, None, grad.sum(0) if wants_bias else None, *[None] * (3 + len(ctx.staged))


def spread(numbers: Tensor, sizes: Sequence[int]) -> Tensor:
    """One number as it is (); of several, each as often as its size says (sum of sizes,)."""
    if len(sizes) == 1:
        return numbers[0]
    return torch.cat([number.expand(size) for number, size in zip(numbers, sizes, strict=True)])
