"""Latents in aspect buckets against images that are cropped and encoded one at a time."""

import numpy as np
import pytest
import torch

from jobs.state import ledger
from jobs.tasks import latents
from jobs.tasks.caption import read_part
from pixart.config.aspect_buckets import kept_fraction
from pixart.data import manifest as manifests
from pixart.data.encoders.vae import decode, encode, load_vae
from pixart.data.images.screening import decode as decode_image
from pixart.data.images.screening import resize_and_crop
from pixart.data.store.layout import LATENTS
from pixart.data.store.zarr_store import Store
from tests.support.bucketed_recipe import IMAGES, SHARDS, SIZES


def psnr(images: np.ndarray, expected: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB of uint8 images."""
    return float(10 * np.log10(255**2 / np.mean((images.astype(float) - expected) ** 2)))


def test_latents_of_every_bucket(bucketed_recipe):
    """Each image is in the bucket of its shape, and decodes as well as an image that the VAE has just encoded."""
    manifest = manifests.read(bucketed_recipe.data.path)
    store, vae = Store(manifest), load_vae(manifest.data.vae)
    rows = store.valid_rows()
    assert len(rows) == IMAGES
    items = list(manifests.open_images(manifest).read(0, IMAGES))
    for bucket, (height, width) in enumerate(manifest.image_shapes):
        members = rows[store.bucket_of(rows) == bucket]
        assert len(members) == IMAGES // len(SIZES)
        images = [decode_image(items[row].data, manifest.data.screening) for row in members]
        assert all(kept_fraction(*image.size, (height, width)) > 0.7 for image in images)
        cropped = np.stack([np.asarray(resize_and_crop(image, height, width)) for image in images])
        encoded = encode(vae, cropped, manifest.data.pixel_range)
        stored = store.read(LATENTS, members)
        assert np.allclose(stored, encoded, atol=1e-2)
        reference = psnr(decode(vae, torch.as_tensor(encoded), manifest.data.pixel_range), cropped)
        assert psnr(decode(vae, torch.from_numpy(stored), manifest.data.pixel_range), cropped) == pytest.approx(
            reference, abs=0.1
        )


def test_the_ledger_counts_all_buckets(bucketed_recipe, monkeypatch):
    path = bucketed_recipe.data.path
    manifest = manifests.read(path)
    for shard in range(SHARDS):
        entry = ledger.read(path, "latents", shard)
        assert entry is not None
        assert (entry.rows, entry.valid) == (IMAGES // SHARDS, sum(read_part(path, shard)["valid"].to_pylist()))
        assert entry.checksum == latents.checksum(Store(manifest).read_shard(shard))
    monkeypatch.setattr(latents, "encode_shard", None)  # not called: all shards are complete
    latents.run(path, list(range(SHARDS)))
