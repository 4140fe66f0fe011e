"""Scales from data: amax of input, weight and grad_output of every FP8 linear, through the true loss, both ways."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pixart.checkpoint import Normalization
from pixart.data import manifest as manifests
from pixart.data.store import Store
from pixart.data.text import TextEncoder
from pixart.model.dit import DiT, no_class
from pixart.model.flow import flow_loss, interpolate, stratified_time
from pixart.model.fp8 import Plan, float8_linears, swap_linears

SYNTHETIC_TEXT_TOKENS = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationBatch:
    latents: Tensor  # (B, C, h, w), normalized
    label: Tensor  # (B,)
    text: Tensor  # (B, L, text_dim)
    text_mask: Tensor  # (B, L)


def dataset_batches(path: str, normalization: Normalization, batches: int, batch: int) -> list[CalibrationBatch]:
    """`batches` batches of `batch` rows drawn from a finished dataset, with the text states that training reads."""
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


def synthetic_batches(config: dict, text_dim: int, batches: int, batch: int) -> list[CalibrationBatch]:
    """Latents and text of zero mean and unit variance, for a checkpoint whose data is not at hand."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, config["in_dim"], config["base_image_size"], config["base_image_size"])
    return [
        CalibrationBatch(
            latents=torch.randn(shape, generator=generator),
            label=torch.randint(config.get("num_classes", 1), (batch,), generator=generator),
            text=torch.randn(batch, SYNTHETIC_TEXT_TOKENS, text_dim, generator=generator),
            text_mask=torch.ones(batch, SYNTHETIC_TEXT_TOKENS, dtype=torch.bool),
        )
        for _ in range(batches)
    ]


def without_class(model: DiT, batch: CalibrationBatch) -> CalibrationBatch:
    return dataclasses.replace(batch, label=no_class(model, len(batch.latents)))


def batch_loss(model: DiT, batch: CalibrationBatch, seed: int) -> Tensor:
    """The training loss at stratified t, with noise by seed -> ()."""
    generator = torch.Generator().manual_seed(seed)
    t = stratified_time(len(batch.latents), generator)
    noise = torch.randn(batch.latents.shape, generator=generator)
    condition = {"label": batch.label} if model.stage == 1 else {"text": batch.text, "text_mask": batch.text_mask}
    return flow_loss(model(interpolate(batch.latents, noise, t), t, **condition), batch.latents, noise)


@torch.no_grad()
def mean_loss(model: DiT, batches: Sequence[CalibrationBatch]) -> float:
    return float(torch.stack([batch_loss(model, batch, seed) for seed, batch in enumerate(batches)]).mean())


def measure_amax(model: DiT, plan: Plan, batches: Sequence[CalibrationBatch]) -> dict[str, Tensor]:
    """Largest magnitude per linear of the plan and slot (3,) over all batches; the model's linears are swapped.

    A slot that no value reaches is 0: behind a zero-initialized projection there is no gradient yet.
    """
    swap_linears(model, plan)
    linears = dict(float8_linears(model))
    for module in linears.values():
        module.observe = True
    for seed, batch in enumerate(batches):
        batch_loss(model, batch, seed).backward()
        model.zero_grad(set_to_none=True)
    for module in linears.values():
        module.observe = False
    return {name: module.amax_history[0].clone() for name, module in linears.items()}
