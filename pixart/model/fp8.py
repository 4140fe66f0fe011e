"""FP8 linears with delayed scaling, and all that knows what a scale is.

A tensor is cast as `round(x * scale)` with `scale = format.max / amax / 2**margin`, where amax is the largest
magnitude of the last steps ("FP8 formats for deep learning", arXiv 2209.05433). Input and weight are E4M3, the
gradient of the output is E5M2. On a GPU the products run on FP8 tensor cores; on a CPU the values are rounded to
the same grid and multiplied in float32, which gives the same result up to the order of summation.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn


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

OVERFLOW_WEIGHT = 1 / 32  # of a step in the running share of steps that overflow
OVERFLOW_LIMIT = 0.5  # a share above which delayed scaling does not follow a tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Which linears run in FP8, and how their scales follow the data."""

    linears: tuple[str, ...]  # module names
    kept: Mapping[str, str] = field(default_factory=dict)  # module name -> why it stays in BF16
    recipe: str = "delayed"
    history: int = 16  # rows of amax history, the staging row included
    margin: int = 0  # powers of two of headroom
    batch: int = 1  # images of a rank's step: gradients of a mean are in inverse proportion to it


def scale_from_amax(amax: Tensor, previous: Tensor, format_max: Tensor | float, margin: int = 0) -> Tensor:
    """format_max / amax / 2**margin in float32; where amax is 0, infinite or not a number, the previous scale."""
    scale = format_max / amax.float() / 2.0**margin
    usable = torch.isfinite(amax) & (amax > 0) & torch.isfinite(scale)
    return torch.where(usable, scale, previous)


def quantize(x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """x * scale, saturated and rounded to `fmt`: an FP8 tensor on a GPU, its exact float32 values on a CPU."""
    if x.is_cuda:
        return (x.float() * scale).clamp(-fmt.max, fmt.max).to(fmt.dtype)
    return round_to_format_((x.float() * scale).clamp_(-fmt.max, fmt.max), fmt)


def round_to_format_(x: Tensor, fmt: Format) -> Tensor:
    """Rounds float32 values within the format's range to its grid, half to even, as a cast there and back; in place.

    Adding and subtracting 1.5 * 2**(e + 23 - m), for a value of exponent e and a format of m mantissa bits, leaves
    just those m bits. A cast to FP8 on a CPU takes three times as long.
    """
    exponent = (x.view(torch.int32) & 0x7F80_0000).clamp_(min=(fmt.min_exponent + 127) << 23)
    magic = exponent.add_(((23 - fmt.mantissa_bits) << 23) | 0x0040_0000).view(torch.float32)
    return x.add_(magic).sub_(magic)


def scaled_matmul(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, *, bias: Tensor | None, fast: bool
) -> Tensor:
    """Quantized a (m, k) times quantized b (n, k) transposed, scales divided out, plus bias (n,) -> (m, n).

    `fast` accumulates in fewer bits on a GPU, which is customary forward and not backward.
    """
    if not a.is_cuda:
        start, beta = (a.new_zeros(()), 0) if bias is None else (bias.float(), 1)
        return torch.addmm(start, a, b.t(), beta=beta, alpha=1 / float(scale_a * scale_b)).to(dtype)
    fused = bias is not None and dtype != torch.float32  # cuBLAS has no bias for a float32 result
    product = torch._scaled_mm(
        a.contiguous(),
        b.contiguous().t(),
        scale_a=scale_a.reciprocal(),
        scale_b=scale_b.reciprocal(),
        bias=bias if fused else None,
        out_dtype=dtype,
        use_fast_accum=fast,
    )
    return product if fused or bias is None else product + bias


class _Float8Product(torch.autograd.Function):
    """x (rows, in) times weight (out, in) transposed plus bias (out,); all three products of a step in FP8."""

    @staticmethod
    def forward(
        ctx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        scale: Tensor,
        staged: Tensor,
        record: bool,
    ) -> Tensor:
        if record:
            record_amax(staged, INPUT, x)
            record_amax(staged, WEIGHT, weight)
        ctx.staged, ctx.dtypes = staged, (x.dtype, weight.dtype)
        x8, weight8 = quantize(x, scale[INPUT], E4M3), quantize(weight, scale[WEIGHT], E4M3)
        # The scales are copied: by the time of the backward pass they may be those of the next step.
        ctx.save_for_backward(x8, weight8, scale.clone())
        return scaled_matmul(x8, weight8, scale[INPUT], scale[WEIGHT], x.dtype, bias=bias, fast=True)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x8, weight8, scale = ctx.saved_tensors
        record_amax(ctx.staged, GRAD_OUTPUT, grad)
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad  # nobody asks for the text's
        input_scale, weight_scale, grad_scale = scale
        grad8 = quantize(grad, grad_scale, E5M2)
        x_dtype, weight_dtype = ctx.dtypes
        grad_x = grad_weight = None
        if wants_x:
            grad_x = scaled_matmul(grad8, weight8.t(), grad_scale, weight_scale, x_dtype, bias=None, fast=False)
        if wants_weight:
            grad_weight = scaled_matmul(grad8.t(), x8.t(), grad_scale, input_scale, weight_dtype, bias=None, fast=False)
        return grad_x, grad_weight, grad.sum(0) if wants_bias else None, None, None, None


def record_amax(staged: Tensor, slot: int, x: Tensor) -> None:
    """Raises `staged[slot]` to the largest magnitude in x; a not-a-number wins."""
    low, high = torch.aminmax(x.detach())
    staged[slot] = torch.maximum(staged[slot], torch.maximum(-low, high).float())


class Float8Linear(nn.Linear):
    """A linear whose products run in FP8; parameters and state-dict keys are those of the nn.Linear it replaces.

    `scale` (3,) and `amax_history` (history, 3) are float32, by slot of SLOTS. Row 0 of the history is staged by the
    current step, rows 1 to the last run from oldest to newest (TransformerEngine's layout). `overflow_share` (3,) is
    a running mean: in which share of the steps the tensor had values that its scale does not let through.
    """

    scale: Tensor
    amax_history: Tensor
    overflow_share: Tensor
    in_fp8 = True  # a linear that keeps overflowing goes on without

    @classmethod
    def from_linear(cls, linear: nn.Linear, plan: Plan) -> "Float8Linear":
        with torch.device("meta"):
            module = cls(linear.in_features, linear.out_features, bias=linear.bias is not None)
        module.weight, module.bias = linear.weight, linear.bias
        device = linear.weight.device
        module.register_buffer("scale", torch.ones(len(SLOTS), device=device), persistent=False)
        history = torch.zeros(plan.history, len(SLOTS), device=device)
        module.register_buffer("amax_history", history, persistent=False)
        module.register_buffer("overflow_share", torch.zeros(len(SLOTS), device=device), persistent=False)
        return module

    def forward(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        if not self.in_fp8:
            return super().forward(x)
        rows = x.flatten(0, -2)
        record = torch.is_grad_enabled()
        staged = self.amax_history[0]
        product = _Float8Product.apply(rows, self.weight, self.bias, self.scale, staged, record)
        return product.unflatten(0, x.shape[:-1])


def swap_linears(model: nn.Module, plan: Plan) -> None:
    """Replaces each linear that the plan names, in place; parameters are shared, state-dict keys do not change.

    Raises ValueError for a name that is no linear of the model.
    """
    for name in plan.linears:
        parent_name, _, child = name.rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
            linear = parent.get_submodule(child)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"FP8 plan names {name!r}, which is no linear of this model")
        setattr(parent, child, Float8Linear.from_linear(linear, plan))


def float8_linears(model: nn.Module) -> Iterator[tuple[str, Float8Linear]]:
    return (
        (name, module) for name, module in model.named_modules() if isinstance(module, Float8Linear) and module.in_fp8
    )


@torch.no_grad()
def update_scales(model: nn.Module, plan: Plan) -> None:
    """Ends a step: staged amax, reduced over ranks, joins the history, and the scales follow its maximum.

    Of a step with values that are not finite, which the optimizer leaves out, the last amax joins again.
    """
    linears = [module for _, module in float8_linears(model)]
    if not linears:
        return
    histories = torch.stack([module.amax_history for module in linears])  # (linears, history, 3)
    staged = histories[:, 0].contiguous()
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(staged, op=dist.ReduceOp.MAX)
    histories[:, 0] = torch.where(staged.isfinite(), staged, histories[:, -1])
    format_max = torch.tensor([fmt.max for fmt in FORMATS], device=histories.device)
    previous = torch.stack([module.scale for module in linears])
    over = (histories[:, 0] * previous > format_max).float()
    shares = torch.stack([module.overflow_share for module in linears]).lerp_(over, OVERFLOW_WEIGHT)
    scales = scale_from_amax(histories.amax(dim=1), previous, format_max, plan.margin)
    histories = histories.roll(-1, dims=1)
    histories[:, 0] = 0
    for module, scale, history, share in zip(linears, scales, histories, shares, strict=True):
        module.scale.copy_(scale)
        module.amax_history.copy_(history)
        module.overflow_share.copy_(share)


@torch.no_grad()
def health(model: nn.Module) -> dict[str, dict[str, float]]:
    """`scale`, `headroom` and `overflow_share` by linear and slot, `NAME.input` and so on.

    Headroom is in powers of two: how many times the last amax may double before it overflows; 0 of a tensor that was
    not seen yet.
    """
    linears = dict(float8_linears(model))
    if not linears:
        return {}
    scales = torch.stack([module.scale for module in linears.values()])
    newest = torch.stack([module.amax_history[-1] for module in linears.values()])
    shares = torch.stack([module.overflow_share for module in linears.values()])
    format_max = torch.tensor([fmt.max for fmt in FORMATS], device=scales.device)
    headroom = torch.where(newest > 0, (format_max / (newest * scales)).log2(), 0.0)
    keys = [f"{name}.{slot}" for name in linears for slot in SLOTS]
    measures = {"scale": scales, "headroom": headroom, "overflow_share": shares}
    return {what: dict(zip(keys, values.flatten().tolist(), strict=True)) for what, values in measures.items()}


def fall_back(model: nn.Module, plan: Plan, step: int) -> Plan:
    """Takes linears that keep overflowing out of FP8, in place -> the plan without them, or the same one.

    Delayed scaling trusts that a tensor is like it was: where that does not hold in most steps, it clips most steps.
    """
    shares = {name: module.overflow_share.max() for name, module in float8_linears(model)}
    if not shares:
        return plan
    found = torch.stack(list(shares.values())).tolist()
    reasons = {
        name: f"overflowed in {share:.0%} of the steps before step {step}"
        for name, share in zip(shares, found, strict=True)
        if share > OVERFLOW_LIMIT
    }
    for name in reasons:
        model.get_submodule(name).in_fp8 = False
    left = tuple(name for name in plan.linears if name not in reasons)
    return replace(plan, linears=left, kept={**plan.kept, **reasons}) if reasons else plan


def calibrated_state(amax: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """The `scale_state` of a model whose linears have measured `amax[name]` (3,), in every row but the staging one.

    A zero leaves a slot's scale at 1 until a step has seen its tensor.
    """
    format_max = torch.tensor([fmt.max for fmt in FORMATS])
    state = {}
    for name in plan.linears:
        history = torch.zeros(plan.history, len(SLOTS))
        history[1:] = amax[name]
        state[f"{name}.scale"] = scale_from_amax(amax[name], torch.ones(len(SLOTS)), format_max, plan.margin)
        state[f"{name}.amax_history"] = history
        state[f"{name}.overflow_share"] = torch.zeros(len(SLOTS))
    return state


@torch.no_grad()
def rescale_gradients(model: nn.Module, factor: float) -> None:
    """Follows a change of the batch: gradients, and so their amax, become `factor` times as large."""
    for _, module in float8_linears(model):
        measured = module.amax_history[:, GRAD_OUTPUT].any()
        module.amax_history[:, GRAD_OUTPUT] *= factor
        module.scale[GRAD_OUTPUT] /= torch.where(measured, factor, 1.0)


def scale_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors themselves, by module name: NAME.scale, NAME.amax_history and NAME.overflow_share."""
    return {
        f"{name}.{buffer}": getattr(module, buffer)
        for name, module in float8_linears(model)
        for buffer in ("scale", "amax_history", "overflow_share")
    }


def scale_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of them on the CPU: what a checkpoint keeps."""
    return {name: tensor.cpu().clone() for name, tensor in scale_tensors(model).items()}


@torch.no_grad()
def load_scale_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Puts back what `scale_state` gave. Raises ValueError unless the names and shapes are just those of the model."""
    own = scale_tensors(model)
    wrong = {key for key in own.keys() & state.keys() if own[key].shape != state[key].shape}
    if odd := sorted(own.keys() ^ state.keys() | wrong):
        raise ValueError(
            f"FP8 scales do not fit the plan: {len(odd)} missing, unknown or of another shape, as {odd[0]}"
        )
    for name, tensor in own.items():
        tensor.copy_(state[name])
