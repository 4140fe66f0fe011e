"""Scales from data: amax of input, weight and grad_output of every FP8 linear, through the true loss, both ways."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from conversion.options import STATEFUL, Options, Statistic
from pixart.checkpoint import Checkpoint, Normalization
from pixart.data import manifest as manifests
from pixart.data.store import Store
from pixart.data.text import TextEncoder
from pixart.model import fp8_products
from pixart.model.dit import DiT, no_class
from pixart.model.flow import flow_loss, interpolate, stratified_time
from pixart.model.fp8 import Plan, calibrated_state
from pixart.model.fp8_products import FORMATS, GRAD_OUTPUT, INPUT, SLOTS, WEIGHT, Format, through_fp8

SYNTHETIC_TEXT_TOKENS = 32
PERCENTILE = 0.9999
SAMPLED = 1 << 20  # values of a tensor that a percentile or an error is taken over
CLIPPINGS = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])  # of the largest magnitude, that MSE-best tries


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationBatch:
    latents: Tensor  # (B, C, h, w), normalized
    label: Tensor  # (B,)
    text: Tensor  # (B, L, text_dim)
    text_mask: Tensor  # (B, L)


def dataset_batches(path: str, normalization: Normalization, batches: int, batch: int) -> list[CalibrationBatch]:
    """`batches` batches of `batch` rows drawn from a finished dataset, with the text states that training reads.

    No row is drawn twice where there are enough of them.
    """
    manifest = manifests.read(path)
    channels, wanted = manifest.latent_shape[0], len(normalization.mean)
    if channels != wanted:
        raise ValueError(f"dataset {path} has latents of {channels} channels, the model reads {wanted}")
    store = Store(manifest)
    valid = store.valid_rows()
    if len(valid) == 0:
        raise ValueError(f"dataset {path} has no valid row: run the latents job first")
    rows = np.random.default_rng(0).choice(valid, size=(batches, batch), replace=len(valid) < batches * batch)
    data = manifest.data
    encoder = None
    if not data.text_states:
        encoder = TextEncoder(data.text_encoder, tokens=data.text_tokens, scale=data.text_scale)
    drawn = []
    for chosen in rows:
        mask = torch.from_numpy(store.read("token_mask", chosen))
        if encoder:
            text = encoder.states(store.read("token_ids", chosen), mask).cpu()
        else:
            text = torch.from_numpy(store.read("text_states", chosen)).float()
        drawn.append(
            CalibrationBatch(
                latents=normalization.apply(torch.from_numpy(store.read("latents", chosen))),
                label=torch.from_numpy(store.read("label", chosen)).long(),
                text=text,
                text_mask=mask,
            )
        )
    return drawn


def synthetic_batches(config: Mapping, text_dim: int, batches: int, batch: int) -> list[CalibrationBatch]:
    """Latents and text of zero mean and unit variance, for a checkpoint whose data is not at hand."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, config["in_dim"], config["base_image_size"], config["base_image_size"])
    return [
        CalibrationBatch(
            latents=torch.randn(shape, generator=generator),
            label=torch.randint(config.get("num_classes") or 1, (batch,), generator=generator),
            text=torch.randn(batch, SYNTHETIC_TEXT_TOKENS, text_dim, generator=generator),
            text_mask=torch.ones(batch, SYNTHETIC_TEXT_TOKENS, dtype=torch.bool),
        )
        for _ in range(batches)
    ]


def without_class(model: DiT, batch: CalibrationBatch) -> CalibrationBatch:
    return dataclasses.replace(batch, label=no_class(model, len(batch.latents)))


def batch_loss(model: DiT, batch: CalibrationBatch, seed: int) -> Tensor:
    """The training loss at stratified t, with noise by seed -> ()."""
    device = model.adaLN1.weight.device
    generator = torch.Generator().manual_seed(seed)
    t = stratified_time(len(batch.latents), generator).to(device)
    noise = torch.randn(batch.latents.shape, generator=generator).to(device)
    data = batch.latents.to(device)
    if model.stage == 1:
        label = batch.label.to(device)
        condition = {"label": torch.where(label < 0, model.config.num_classes - 1, label)}
    else:
        condition = {"text": batch.text.to(device), "text_mask": batch.text_mask.to(device)}
    noised = interpolate(data, noise, t)
    if torch.is_grad_enabled():
        noised.requires_grad_()  # so that gradients reach every layer, whether or not its weights ask for them
    return flow_loss(model(noised, t, **condition), data, noise)


@torch.no_grad()
def mean_loss(model: DiT, batches: Sequence[CalibrationBatch], precision: torch.dtype = torch.float32) -> float:
    device = model.adaLN1.weight.device.type
    with torch.autocast(device, precision, enabled=precision != torch.float32):
        return float(torch.stack([batch_loss(model, batch, seed) for seed, batch in enumerate(batches)]).mean())


Visit = Callable[[str, int, Tensor], None]  # name of a linear, slot, tensor (rows, features)


def watch(
    model: DiT,
    linears: Sequence[str],
    batches: Sequence[CalibrationBatch],
    visit: Visit,
    start: int = 0,
    step: int = 1,
) -> None:
    """Shows `visit` every linear's input, weight and grad_output, of every `step`th batch, in full precision.

    A linear that no gradient reaches is shown no grad_output. One block's tensors are in memory at a time.
    """
    model.requires_grad_(False)
    backward, handles = False, []

    def forward(name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if backward or not name.startswith("dit_blocks."):
            visit(name, INPUT, inputs[0].detach().flatten(0, -2))
            visit(name, WEIGHT, module.weight.detach())
        if output.requires_grad and not backward:
            output.register_hook(lambda grad: visit(name, GRAD_OUTPUT, grad.flatten(0, -2)))

    for name in linears:
        handles.append(model.get_submodule(name).register_forward_hook(partial(forward, name)))
    try:
        with recomputed_blocks(model):
            for seed in range(start, len(batches), step):
                backward = False
                loss = batch_loss(model, batches[seed], seed)
                backward = True
                loss.backward()
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recomputed_blocks(model: DiT) -> Iterator[None]:
    """Blocks run again on the way back, so that the tensors of one at a time are in memory."""
    model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        model.disable_gradient_checkpointing()


def largest(x: Tensor, fmt: Format) -> Tensor:
    return fp8_products.largest(x)


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
        errors.append((through_fp8(values, scale, fmt) - values).square().sum())
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
        amax[name][slot] = torch.maximum(amax[name][slot], measure(x, FORMATS[slot]).float().cpu())

    if not dist.is_initialized():
        watch(model, linears, batches, visit)
        return amax
    watch(model, linears, batches, visit, start=dist.get_rank(), step=dist.get_world_size())
    if amax:
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
