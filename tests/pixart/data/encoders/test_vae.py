"""Encoding and decoding in both pixel ranges, against the VAE called by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from pixart.data.encoders.vae import decode, encode, load_vae


@pytest.fixture
def photos(shared_data) -> np.ndarray:
    """Sixteen photos, uint8 (16, 256, 256, 3)."""
    paths = sorted(shared_data.glob("photos/*/*.jpg"))[:16]
    return np.stack([np.asarray(Image.open(path).convert("RGB").crop((0, 0, 256, 256))) for path in paths])


def psnr(images: np.ndarray, decoded: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in decibels, averaged over the images."""
    error = ((images.astype(float) - decoded) ** 2).reshape(len(images), -1).mean(1)
    return float(np.mean(10 * np.log10(255**2 / error)))


@pytest.mark.slow
def test_latents_of_pixels_in_0_1_decode_as_the_original_training_decoded_them(shared_data, photos):
    vae = load_vae(str(shared_data / "tiny-vae"))
    with torch.no_grad():
        pixels = torch.from_numpy(photos).permute(0, 3, 1, 2).float() / 255
        latents = vae.encode(pixels).latent_dist.mean
        original = vae.decode(latents).sample.clamp(0, 1).mul(255).round().permute(0, 2, 3, 1).numpy()
    ours = encode(vae, photos, (0, 1))
    assert np.abs(ours - latents.numpy()).max() < 0.01  # float16
    expected = psnr(photos, original)
    assert psnr(photos, decode(vae, ours, (0, 1))) == pytest.approx(expected, abs=0.1)
    assert psnr(photos, decode(vae, ours, (-1, 1))) < expected - 5  # the wrong range is washed out


def test_the_default_range_maps_black_and_white_to_minus_one_and_one():
    vae = load_vae("demo")
    images = np.stack([np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)])
    with torch.no_grad():
        by_hand = vae.encode(torch.stack([-torch.ones(3, 64, 64), torch.ones(3, 64, 64)])).latent_dist.mean
    assert np.allclose(encode(vae, images, (-1, 1)), by_hand.numpy(), atol=1e-2)
    assert not np.allclose(encode(vae, images, (0, 1)), by_hand.numpy(), atol=1e-2)
