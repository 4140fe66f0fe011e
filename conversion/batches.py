"""Batches for calibration and verification: rows of a dataset or random ones, and how many of them make a pass."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pixart.checkpoint.normalization import Normalization
from pixart.data import manifest as manifests
from pixart.data.encoders.text_encoder import TextEncoder
from pixart.data.store.zarr_store import Store
from pixart.model.dit import DiT, no_class

SYNTHETIC_TEXT_TOKENS = 32
ROWS = 4096  # image tokens of a pass: with fewer, reading the weights is what takes the time


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
    if not data.store_text_embeddings:
        encoder = TextEncoder(data.text_encoder, tokens=data.max_text_tokens, scale=data.text_scale)
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


def at_once(model: DiT, latents: Tensor) -> int:
    """How many such batches (B, C, h, w) make a pass of ROWS; one at the least."""
    return max(1, ROWS // (latents[:, 0].numel() // model.config.patch_size**2))
