"""Calibration: the amax of input, weight and grad_output of every FP8 linear, measured with the training loss."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conversion.batches import CalibrationBatch, batches_per_pass
from conversion.options import STATEFUL, Options, Statistic
from pixart.checkpoint.directory import Checkpoint
from pixart.model.dit import DiT
from pixart.model.fp8 import ops
from pixart.model.fp8.ops import FORMATS, GRAD_OUTPUT, INPUT, SLOTS, WEIGHT, Format, fake_quantize
from pixart.model.fp8.plan import Plan
from pixart.model.fp8.scaling import calibrated_state
from pixart.model.rectified_flow import flow_loss, interpolate, shift_time, stratified_time

PERCENTILE = 0.9999
MAX_SAMPLED_VALUES = 1 << 20  # of a tensor, for the percentile and the mean squared error
CLIPPING_RATIOS = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])  # candidates of the statistic "mse"


SeededBatches = Mapping[int, CalibrationBatch]  # by the seed of each batch's noise


def batch_losses(model: DiT, batches: SeededBatches) -> Tensor:
    """Return the training loss of each batch at stratified t -> (num_batches,).

    The batches have the same size and share one forward pass; each one's t and noise are drawn from its seed.
    """
    device = model.adaLN1.weight.device
    group = list(batches.values())
    data = torch.cat([batch.latents for batch in group]).to(device)
    draws = [time_and_noise(batch, seed) for seed, batch in batches.items()]
    t, noise = (torch.cat(parts).to(device) for parts in zip(*draws, strict=True))
    if model.stage == 1:
        label = torch.cat([batch.label for batch in group]).to(device)
        condition = {"label": torch.where(label < 0, model.config.num_classes - 1, label)}
    else:
        condition = {
            "text": torch.cat([batch.text for batch in group]).to(device),
            "text_mask": torch.cat([batch.text_mask for batch in group]).to(device),
        }
    noised = interpolate(data, noise, t)
    if torch.is_grad_enabled():
        noised.requires_grad_()  # the backward pass reaches every layer even if no weight requires a gradient
    parts = (tensor.chunk(len(group)) for tensor in (model(noised, t, **condition), data, noise))
    return torch.stack([flow_loss(*tensors) for tensors in zip(*parts, strict=True)])


def time_and_noise(batch: CalibrationBatch, seed: int) -> tuple[Tensor, Tensor]:
    """Draw t (B,), shifted as in training, and noise (B, C, h, w) for a batch from a seed."""
    generator = torch.Generator().manual_seed(seed)
    t = stratified_time(len(batch.latents), generator)
    return shift_time(t, batch.time_shift), torch.randn(batch.latents.shape, generator=generator)


def split_passes(model: DiT, batches: SeededBatches) -> Iterator[SeededBatches]:
    """Yield the batches in groups that share a forward pass: consecutive ones of the same shape."""
    remaining = list(batches.items())
    while remaining:
        group = remaining[: batches_per_pass(model, remaining[0][1].latents)]
        shapes = [batch.latents.shape for _, batch in group]
        count = sum(1 for _ in takewhile(shapes[0].__eq__, shapes))
        yield dict(group[:count])
        del remaining[:count]


@torch.no_grad()
def mean_loss(model: DiT, batches: Sequence[CalibrationBatch]) -> float:
    """Return the mean training loss over the batches, computed in BF16."""
    with bf16_autocast(model):
        losses = [batch_losses(model, group) for group in split_passes(model, dict(enumerate(batches)))]
        return float(torch.cat(losses).mean())


def bf16_autocast(model: DiT) -> torch.autocast:
    """Compute in BF16, as training does: BF16 rounding is part of the gradients that are calibrated.

    Casts of weights are not cached, because a pass reads each weight once.
    """
    return torch.autocast(model.adaLN1.weight.device.type, torch.bfloat16, cache_enabled=False)


Visitor = Callable[[str, int, Tensor], None]  # name of a linear, slot, tensor (batches, rows, features)


def observe_linears(model: DiT, linears: Sequence[str], batches: SeededBatches, visit: Visitor) -> Tensor:
    """Call `visit` with every linear's input, weight and grad_output of every batch; return the losses (batches,).

    The passes run in BF16. `visit` is not called with the grad_output of a linear that no gradient reaches, and it is
    called with a weight once per pass, with a batch dimension of 1. The activations of one block at a time are kept.
    """
    model.requires_grad_(False)
    backward, count, handles, losses = False, 0, [], []

    def by_batch(tensor: Tensor) -> Tensor:
        return tensor.detach().flatten(0, -2).unflatten(0, (count, -1))

    def forward(name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if backward or not name.startswith("dit_blocks."):  # blocks are visited when they are recomputed
            visit(name, INPUT, by_batch(inputs[0]))
            visit(name, WEIGHT, cast(Tensor, module.weight).detach()[None])
        if output.requires_grad and not backward:
            output.register_hook(lambda grad: visit(name, GRAD_OUTPUT, by_batch(grad)))

    for name in linears:
        handles.append(model.get_submodule(name).register_forward_hook(partial(forward, name)))
    try:
        with activation_checkpointing(model):
            for group in split_passes(model, batches):
                backward, count = False, len(group)
                with bf16_autocast(model):
                    group_losses = batch_losses(model, group)
                backward = True
                group_losses.sum().backward()
                losses.append(group_losses.detach())
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(losses) if losses else torch.zeros(0)


@contextmanager
def activation_checkpointing(model: DiT) -> Iterator[None]:
    """Recompute each block in the backward pass, which keeps the activations of one block at a time in memory."""
    model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        model.disable_gradient_checkpointing()


def max_magnitude(x: Tensor, fmt: Format) -> Tensor:
    """Return the largest magnitude of x -> ()."""
    return ops.amax(x)


def percentile(x: Tensor, fmt: Format) -> Tensor:
    """Return the PERCENTILE quantile of the magnitudes of x -> ()."""
    values = subsample(x).abs().float()
    return values.kthvalue(max(1, round(PERCENTILE * len(values)))).values


def mse_optimal(x: Tensor, fmt: Format) -> Tensor:
    """Return the max magnitude times the CLIPPING_RATIOS entry with the least mean squared quantization error -> ()."""
    values, amax = subsample(x).float(), max_magnitude(x, fmt)
    if not torch.isfinite(amax) or amax == 0:
        return amax
    errors = []
    for ratio in CLIPPING_RATIOS:
        scale = fmt.max / (amax * ratio)
        errors.append((fake_quantize(values, scale, fmt) - values).square().sum())
    return amax * CLIPPING_RATIOS[int(torch.stack(errors).argmin())]


def subsample(x: Tensor) -> Tensor:
    """Return every n-th value of x, flattened, so that about MAX_SAMPLED_VALUES remain."""
    flat = x.flatten()
    return flat[:: max(1, len(flat) // MAX_SAMPLED_VALUES)]


STATISTICS: dict[Statistic, Callable[[Tensor, Format], Tensor]] = {
    "max": max_magnitude,
    "percentile": percentile,
    "mse": mse_optimal,
}


def measure_amax(
    model: DiT, linears: Sequence[str], batches: Sequence[CalibrationBatch], statistic: Statistic = "max"
) -> dict[str, Tensor]:
    """Return the amax (3,) of each linear by slot: the largest value of `statistic` over the batches.

    In a process group every rank measures a share of the batches and all return the maximum over ranks. A slot whose
    values are all zero has an amax of 0: a linear that feeds a zero-initialized projection has no gradient yet.
    """
    amax = {name: torch.zeros(len(SLOTS)) for name in linears}
    measure = STATISTICS[statistic]

    def visit(name: str, slot: int, x: Tensor) -> None:
        for batch in x:
            amax[name][slot] = torch.maximum(amax[name][slot], measure(batch, FORMATS[slot]).float().cpu())

    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    observe_linears(model, linears, dict(list(enumerate(batches))[rank::ranks]), visit)
    if dist.is_initialized() and amax:
        stacked = torch.stack(list(amax.values())).to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(stacked, op=dist.ReduceOp.MAX)
        amax = dict(zip(amax, stacked.cpu(), strict=True))
    return amax


def calibrate(
    checkpoint: Checkpoint, model: DiT, batches: Sequence[CalibrationBatch], options: Options
) -> tuple[Checkpoint, dict[str, Tensor]]:
    """Return the checkpoint with calibrated scales, and the amax (3,) of each linear by slot.

    Both are empty for a recipe without stored scales.
    """
    plan = checkpoint.plan
    assert plan is not None
    if plan.recipe != STATEFUL:
        return dataclasses.replace(checkpoint, scales={}), {}
    amax = measure_amax(model, plan.linears, batches[: options.num_batches], options.amax_statistic)
    return dataclasses.replace(checkpoint, scales=calibrated_state(amax, plan)), amax


def uncalibrated_slots(amax: Mapping[str, Tensor], plan: Plan) -> list[str]:
    """Return the names LINEAR.SLOT of the planned linears' tensors whose amax is zero."""
    zero = {name: (amax[name] == 0).nonzero().flatten().tolist() for name in plan.linears if name in amax}
    return [f"{name}.{SLOTS[slot]}" for name, slots in zero.items() for slot in slots]
