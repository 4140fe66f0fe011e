"""Batches for calibration and verification: rows of a dataset, or synthetic data."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pixart.checkpoint.directory import Checkpoint
from pixart.config.latent_space import check_latent_space
from pixart.config.resolutions import recorded_time_shift, time_shift
from pixart.data import manifest as manifests
from pixart.data.encoders.text_encoder import TextEncoder
from pixart.data.store.zarr_store import Store
from pixart.model.dit import DiT, null_labels

SYNTHETIC_TEXT_TOKENS = 32
TOKENS_PER_PASS = 4096  # image tokens; a smaller forward pass spends its time reading the weights


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationBatch:
    """Inputs of one calibration step, on the CPU."""

    latents: Tensor  # (B, C, h, w), normalized
    label: Tensor  # (B,)
    text: Tensor  # (B, L, text_dim)
    text_mask: Tensor  # (B, L)
    time_shift: float = 1.0  # of training at the size of the latents


def dataset_batches(path: str, checkpoint: Checkpoint, num_batches: int, batch_size: int) -> list[CalibrationBatch]:
    """Draw batches from a finished dataset, with the text embeddings that training reads.

    Rows are drawn without replacement if the dataset has enough of them. Those of a batch are of one aspect bucket.
    Each bucket with valid rows has batches in proportion to its rows, and at least one, which may make more batches
    than `num_batches`; the first batches are one of each bucket. Raises ValueError if the dataset has no valid row, or
    latents of another number of channels, pixel range or VAE than the checkpoint.
    """
    manifest, normalization = manifests.read(path), checkpoint.normalization
    channels, expected = manifest.latent_shape[0], len(normalization.mean)
    if channels != expected:
        raise ValueError(f"dataset {path} has latents of {channels} channels, the model reads {expected}")
    check_latent_space(
        "the checkpoint",
        normalization.pixel_range,
        checkpoint.provenance.get("models", {}),
        path,
        manifest.data.pixel_range,
        manifest.models,
    )
    store = Store(manifest)
    valid = store.valid_rows()
    if len(valid) == 0:
        raise ValueError(f"dataset {path} has no valid row; run the latents job first")
    selected = select_rows(store, valid, num_batches, batch_size)
    data = manifest.data
    encoder = None
    if not data.store_text_embeddings:
        encoder = TextEncoder(data.text_encoder, max_tokens=data.max_text_tokens, scale=data.text_scale)
    setting = recorded_time_shift({"provenance": checkpoint.provenance})
    base_size = checkpoint.config["base_image_size"]
    batches = []
    for rows in selected:
        mask = torch.from_numpy(store.read("token_mask", rows))
        if encoder:
            text = encoder.states(store.read("token_ids", rows), mask).cpu()
        else:
            text = torch.from_numpy(store.read("text_states", rows)).float()
        latents = normalization.apply(torch.from_numpy(store.read("latents", rows)))
        height, width = latents.shape[2:]
        batches.append(
            CalibrationBatch(
                latents=latents,
                label=torch.from_numpy(store.read("label", rows)).long(),
                text=text,
                text_mask=mask,
                time_shift=time_shift(setting, height, width, base_size),
            )
        )
    return batches


def select_rows(store: Store, valid: np.ndarray, num_batches: int, batch_size: int) -> list[np.ndarray]:
    """Return the rows (batch_size,) of each batch that `dataset_batches` draws from the valid ones."""
    random, buckets = np.random.default_rng(0), store.bucket_of(valid)
    present, sizes = np.unique(buckets, return_counts=True)
    # The largest remainders get the batches that are left after rounding down.
    shares = num_batches * sizes / len(valid)
    counts = np.floor(shares).astype(int)
    counts[np.argsort(counts - shares, kind="stable")[: num_batches - counts.sum()]] += 1
    first: list[np.ndarray] = []
    others: list[np.ndarray] = []
    for bucket, count in zip(present, np.maximum(counts, 1).tolist(), strict=True):
        rows = valid[buckets == bucket]
        one, *rest = random.choice(rows, size=(count, batch_size), replace=len(rows) < count * batch_size)
        first.append(one)
        others += rest
    return [*first, *(others[index] for index in random.permutation(len(others)))] if len(first) > 1 else first + others


def synthetic_batches(config: Mapping, text_dim: int, num_batches: int, batch_size: int) -> list[CalibrationBatch]:
    """Draw latents and text of zero mean and unit variance, for a checkpoint whose dataset is not available."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, config["in_dim"], config["base_image_size"], config["base_image_size"])
    return [
        CalibrationBatch(
            latents=torch.randn(shape, generator=generator),
            label=torch.randint(config.get("num_classes") or 1, (batch_size,), generator=generator),
            text=torch.randn(batch_size, SYNTHETIC_TEXT_TOKENS, text_dim, generator=generator),
            text_mask=torch.ones(batch_size, SYNTHETIC_TEXT_TOKENS, dtype=torch.bool),
        )
        for _ in range(num_batches)
    ]


def with_null_class(model: DiT, batch: CalibrationBatch) -> CalibrationBatch:
    """Return the batch with every label replaced by the null class."""
    return dataclasses.replace(batch, label=null_labels(model, len(batch.latents)))


def batches_per_pass(model: DiT, latents: Tensor) -> int:
    """Return how many batches with `latents` (B, C, h, w) fill a forward pass of TOKENS_PER_PASS; at least one."""
    return max(1, TOKENS_PER_PASS // (latents[:, 0].numel() // model.config.patch_size**2))
