"""FP8 linears with delayed scaling, and all that knows what a scale is.

A tensor is cast as `round(x * scale)` with `scale = format.max / amax / 2**margin`, where amax is the largest
magnitude of the last steps ("FP8 formats for deep learning", arXiv 2209.05433). Input and weight are E4M3, the
gradient of the output is E5M2. On a GPU the products run on FP8 tensor cores; on a CPU the values are rounded to
the same grid and multiplied in float32, which gives the same result up to the order of summation.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pixart.model.fp8.ops import (
    FORMATS,
    GRAD_OUTPUT,
    INPUT,
    SLOTS,
    WEIGHT,
    Float8Product,
    largest,
    record,
)

ROWS = 16  # that a product of tensor cores takes at once
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


def check_rows(images: int, counts: Mapping[str, int]) -> None:
    """Raises ValueError for rows that a product on a GPU cannot sum over, as the weight gradient does; by what they
    are, `counts` of an image.
    """
    for what, count in counts.items():
        if images * count % ROWS:
            raise ValueError(
                f"FP8 on a GPU: {images} images at once have {images * count} {what}, or a multiple of it, and the "
                f"weight gradient sums over multiples of {ROWS}: take another batch or, in training, "
                "fp8_weight_gradient=false"
            )


def scale_from_amax(amax: Tensor, previous: Tensor, format_max: Tensor | float, margin: int = 0) -> Tensor:
    """format_max / amax / 2**margin in float32; where amax is 0, infinite or not a number, the previous scale."""
    scale = format_max / amax.float() / 2.0**margin
    usable = torch.isfinite(amax) & (amax > 0) & torch.isfinite(scale)
    return torch.where(usable, scale, previous)


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
    fine_weight_gradient = False  # whether the weight's gradient is a product in the input's own precision
    gathered: "Gathered | None" = None  # where the weight comes in FP8

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
        return product([self], x)

    @staticmethod
    def side_by_side(linears: "Sequence[Float8Linear]", x: Tensor) -> Sequence[Tensor]:
        """What each of several linears makes of the same x, as one product; all are in FP8 or all come one by one."""
        if not all(isinstance(linear, Float8Linear) and linear.in_fp8 for linear in linears):
            return [linear(x) for linear in linears]
        return product(linears, x).split([linear.out_features for linear in linears], dim=-1)


@dataclass(kw_only=True, slots=True)
class Gathered:
    """A weight that comes in FP8: what its gradient goes to instead, and its amax."""

    gradient: Tensor
    amax: Tensor


def product(linears: Sequence[Float8Linear], x: Tensor) -> Tensor:
    """x (..., in) times the weights, one after the other -> (..., sum of outs); amax is staged where gradients are."""
    if torch.is_grad_enabled():
        seen = largest(x)
        for linear in linears:
            record(linear.amax_history[0], INPUT, seen)
            own = linear.gathered.amax if linear.gathered else largest(linear.weight)
            record(linear.amax_history[0], WEIGHT, own)
    weights = [linear.gathered.gradient if linear.gathered else linear.weight for linear in linears]
    rows = Float8Product.apply(
        x.flatten(0, -2),
        joined(weights),
        joined([linear.weight.detach() for linear in linears]) if linears[0].gathered else None,
        None if linears[0].bias is None else joined([linear.bias for linear in linears]),
        torch.stack([linear.scale for linear in linears]),  # a copy: the way back may see those of the next step
        tuple(linear.out_features for linear in linears),
        linears[0].fine_weight_gradient,
        *[linear.amax_history[0] for linear in linears],
    )
    return rows.unflatten(0, x.shape[:-1])


def joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def swap_linears(model: nn.Module, plan: Plan, *, fine_weight_gradient: bool = False) -> None:
    """Replaces each linear that the plan names, in place; parameters are shared, state-dict keys do not change.

    `fine_weight_gradient`: the weight's gradient is a product in the input's own precision.

    Raises ValueError for a name that is no linear of the model.
    """
    for parent, child, linear in planned(model, plan):
        swapped = Float8Linear.from_linear(linear, plan)
        swapped.fine_weight_gradient = fine_weight_gradient
        setattr(parent, child, swapped)


def planned(model: nn.Module, plan: Plan) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """Each linear that the plan names, with the module that has it and its name there.

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
        yield parent, child, linear


def float8_linears(model: nn.Module) -> Iterator[tuple[str, Float8Linear]]:
    return (
        (name, module) for name, module in model.named_modules() if isinstance(module, Float8Linear) and module.in_fp8
    )


@functools.cache
def format_maxima(device: torch.device) -> Tensor:  # by slot; copied to the device once: a copy waits for it
    return torch.tensor([fmt.max for fmt in FORMATS], device=device)


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
    format_max = format_maxima(histories.device)
    previous = torch.stack([module.scale for module in linears])
    over = (histories[:, 0] * previous > format_max).float()
    shares = torch.stack([module.overflow_share for module in linears]).lerp_(over, OVERFLOW_WEIGHT)
    scales = scale_from_amax(histories.amax(dim=1), previous, format_max, plan.margin)
    histories = histories.roll(-1, dims=1)
    histories[:, 0] = 0
    torch._foreach_copy_([module.scale for module in linears], list(scales))
    torch._foreach_copy_([module.amax_history for module in linears], list(histories))
    torch._foreach_copy_([module.overflow_share for module in linears], list(shares))


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
    format_max = format_maxima(scales.device)
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
        linear = model.get_submodule(name)
        linear.in_fp8, linear.gathered = False, None
    left = tuple(name for name in plan.linears if name not in reasons)
    return replace(plan, linears=left, kept={**plan.kept, **reasons}) if reasons else plan


def calibrated_state(amax: Mapping[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """The `scale_state` of a model whose linears have measured `amax[name]` (3,), in every row but the staging one.

    A zero leaves a slot's scale at 1 until a step has seen its tensor.
    """
    format_max = format_maxima(torch.device("cpu"))
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
