"""Scales from data: amax of input, weight and grad_output of every FP8 linear, through the true loss, both ways."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from conversion.batches import CalibrationBatch, at_once
from conversion.options import STATEFUL, Options, Statistic
from pixart.checkpoint.directory import Checkpoint
from pixart.model.dit import DiT
from pixart.model.fp8 import ops
from pixart.model.fp8.ops import FORMATS, GRAD_OUTPUT, INPUT, SLOTS, WEIGHT, Format, fake_quantize
from pixart.model.fp8.plan import Plan
from pixart.model.fp8.scaling import calibrated_state
from pixart.model.rectified_flow import flow_loss, interpolate, stratified_time

PERCENTILE = 0.9999
SAMPLED = 1 << 20  # values of a tensor that a percentile or an error is taken over
CLIPPINGS = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])  # of the largest magnitude, that MSE-best tries


Numbered = Mapping[int, CalibrationBatch]  # by the seed of a batch's noise


def batch_losses(model: DiT, batches: Numbered) -> Tensor:
    """The training loss of each batch at stratified t, with noise by its seed; all of one size, in one pass -> (n,)."""
    device = model.adaLN1.weight.device
    together = list(batches.values())
    data = torch.cat([batch.latents for batch in together]).to(device)
    draws = [time_and_noise(batch.latents.shape, seed) for seed, batch in batches.items()]
    t, noise = (torch.cat(parts).to(device) for parts in zip(*draws, strict=True))
    if model.stage == 1:
        label = torch.cat([batch.label for batch in together]).to(device)
        condition = {"label": torch.where(label < 0, model.config.num_classes - 1, label)}
    else:
        condition = {
            "text": torch.cat([batch.text for batch in together]).to(device),
            "text_mask": torch.cat([batch.text_mask for batch in together]).to(device),
        }
    noised = interpolate(data, noise, t)
    if torch.is_grad_enabled():
        noised.requires_grad_()  # so that gradients reach every layer, whether or not its weights ask for them
    parts = (tensor.chunk(len(together)) for tensor in (model(noised, t, **condition), data, noise))
    return torch.stack([flow_loss(*own) for own in zip(*parts, strict=True)])


def time_and_noise(shape: Sequence[int], seed: int) -> tuple[Tensor, Tensor]:
    """-> t (B,), noise (B, C, h, w)."""
    generator = torch.Generator().manual_seed(seed)
    return stratified_time(shape[0], generator), torch.randn(shape, generator=generator)


def passes(model: DiT, batches: Numbered) -> Iterator[Numbered]:
    numbered = list(batches.items())
    while numbered:
        count = at_once(model, numbered[0][1].latents)
        yield dict(numbered[:count])
        del numbered[:count]


@torch.no_grad()
def mean_loss(model: DiT, batches: Sequence[CalibrationBatch]) -> float:
    with in_bf16(model):
        return float(torch.cat([batch_losses(model, own) for own in passes(model, dict(enumerate(batches)))]).mean())


def in_bf16(model: DiT) -> torch.autocast:
    """As training runs, whose gradients have BF16's noise; no weight is kept in it, as a pass needs each but once."""
    return torch.autocast(model.adaLN1.weight.device.type, torch.bfloat16, cache_enabled=False)


Visit = Callable[[str, int, Tensor], None]  # name of a linear, slot, tensor (batches, rows, features)


def watch(model: DiT, linears: Sequence[str], batches: Numbered, visit: Visit) -> Tensor:
    """Shows `visit` every linear's input, weight and grad_output, of every batch, and returns the losses (batches,).

    All is in BF16. A linear that no gradient reaches is shown no grad_output, and a weight is shown once for the
    batches of a pass, as if it were of one. One block's tensors are in memory at a time.
    """
    model.requires_grad_(False)
    backward, count, handles, losses = False, 0, [], []

    def by_batch(tensor: Tensor) -> Tensor:
        return tensor.detach().flatten(0, -2).unflatten(0, (count, -1))

    def forward(name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if backward or not name.startswith("dit_blocks."):
            visit(name, INPUT, by_batch(inputs[0]))
            visit(name, WEIGHT, module.weight.detach()[None])
        if output.requires_grad and not backward:
            output.register_hook(lambda grad: visit(name, GRAD_OUTPUT, by_batch(grad)))

    for name in linears:
        handles.append(model.get_submodule(name).register_forward_hook(partial(forward, name)))
    try:
        with recomputed_blocks(model):
            for own in passes(model, batches):
                backward, count = False, len(own)
                with in_bf16(model):
                    found = batch_losses(model, own)
                backward = True
                found.sum().backward()
                losses.append(found.detach())
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(losses) if losses else torch.zeros(0)


@contextmanager
def recomputed_blocks(model: DiT) -> Iterator[None]:
    """Blocks run again on the way back, so that the tensors of one at a time are in memory."""
    model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        model.disable_gradient_checkpointing()


def largest(x: Tensor, fmt: Format) -> Tensor:
    return ops.amax(x)


def percentile(x: Tensor, fmt: Format) -> Tensor:
    """The magnitude that all but one in ten thousand values stay below."""
    values = thinned(x).abs().float()
    return values.kthvalue(max(1, round(PERCENTILE * len(values)))).values


def mse_best(x: Tensor, fmt: Format) -> Tensor:
    """Of the largest magnitude's CLIPPINGS the one with which values are cast at the smallest squared error."""
    values, top = thinned(x).float(), largest(x, fmt)
    if not torch.isfinite(top) or top == 0:
        return top
    errors = []
    for clipping in CLIPPINGS:
        scale = fmt.max / (top * clipping)
        errors.append((fake_quantize(values, scale, fmt) - values).square().sum())
    return top * CLIPPINGS[int(torch.stack(errors).argmin())]


def thinned(x: Tensor) -> Tensor:
    flat = x.flatten()
    return flat[:: max(1, len(flat) // SAMPLED)]


STATISTICS: dict[Statistic, Callable[[Tensor, Format], Tensor]] = {
    "max": largest,
    "percentile": percentile,
    "mse": mse_best,
}


def measure_amax(
    model: DiT, linears: Sequence[str], batches: Sequence[CalibrationBatch], statistic: Statistic = "max"
) -> dict[str, Tensor]:
    """The statistic of each linear's slots (3,), the largest of all batches, which several ranks share among them.

    A slot that no value reaches is 0: behind a zero-initialized projection there is no gradient yet.
    """
    amax = {name: torch.zeros(len(SLOTS)) for name in linears}
    measure = STATISTICS[statistic]

    def visit(name: str, slot: int, x: Tensor) -> None:
        for part in x:
            amax[name][slot] = torch.maximum(amax[name][slot], measure(part, FORMATS[slot]).float().cpu())

    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    watch(model, linears, dict(list(enumerate(batches))[rank::ranks]), visit)
    if dist.is_initialized() and amax:
        together = torch.stack(list(amax.values())).to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(together, op=dist.ReduceOp.MAX)
        amax = dict(zip(amax, together.cpu(), strict=True))
    return amax


def calibrate(
    checkpoint: Checkpoint, model: DiT, batches: Sequence[CalibrationBatch], options: Options
) -> tuple[Checkpoint, dict[str, Tensor]]:
    """The checkpoint with scales, and the amax of each linear's slots; none for a recipe without scales."""
    plan = checkpoint.plan
    assert plan is not None
    if plan.recipe != STATEFUL:
        return dataclasses.replace(checkpoint, scales={}), {}
    amax = measure_amax(model, plan.linears, batches[: options.batches], options.statistic)
    return dataclasses.replace(checkpoint, scales=calibrated_state(amax, plan)), amax


def unmeasured(amax: Mapping[str, Tensor], plan: Plan) -> list[str]:
    """Names of the slots that no value has reached."""
    found = {name: (amax[name] == 0).nonzero().flatten().tolist() for name in plan.linears if name in amax}
    return [f"{name}.{SLOTS[slot]}" for name, slots in found.items() for slot in slots]
