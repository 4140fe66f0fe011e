import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pixart.demo.patch_vae import DEMO_VAE, PatchAutoencoder, fit
from pixart.demo.scenes import make_scene, render

pytestmark = pytest.mark.slow

SAFETENSORS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def vae() -> PatchAutoencoder:
    return PatchAutoencoder.from_pretrained(DEMO_VAE)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    """256 scenes that the autoencoder was not fitted to, (256, 3, 64, 64) in [-1, 1]."""
    pixels = np.stack([render(make_scene(2, index)) for index in range(256)])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1


def test_packaged_weights_equal_a_refit(vae: PatchAutoencoder):
    refitted = fit()
    packaged = vae.state_dict()
    assert packaged.keys() == refitted.state_dict().keys()
    for name, values in refitted.state_dict().items():
        torch.testing.assert_close(packaged[name], values, rtol=0, atol=1e-4)
    assert vae.config.scaling_factor == pytest.approx(refitted.config.scaling_factor, abs=1e-4)


@torch.no_grad()
def test_unseen_scenes_are_reconstructed(vae: PatchAutoencoder, images: torch.Tensor):
    decoded = vae.decode(vae.encode(images).latent_dist.mean).sample.clamp(-1, 1)
    psnr = 10 * torch.log10(4 / (decoded - images).square().mean())  # dB; the value range is 2
    assert psnr > 28


@torch.no_grad()
def test_scaled_latents_have_unit_deviation(vae: PatchAutoencoder, images: torch.Tensor):
    latents = vae.encode(images).latent_dist.mode()
    assert latents.shape == (256, 16, 8, 8)
    scaled = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    assert scaled.mean().item() == pytest.approx(0, abs=0.03)
    assert scaled.std().item() == pytest.approx(1, abs=0.03)
    by_channel = scaled.std(dim=(0, 2, 3))
    assert by_channel[0] > by_channel[7] > by_channel[15]  # the first components have the largest variance
    assert by_channel[0] / by_channel[15] < 8  # 30 without scaling


@torch.no_grad()
def test_decoder_inverts_encoder(vae: PatchAutoencoder):
    """The components are orthonormal, so encoding decoded latents returns them."""
    latents = torch.randn(2, 16, 3, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(vae.encode(vae.decode(latents).sample).latent_dist.mean, latents, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_patch_affects_its_latent_only(vae: PatchAutoencoder, images: torch.Tensor):
    latents = vae.encode(images[:1]).latent_dist.mean
    changed = images[:1].clone()
    changed[..., 8:16, 24:32] += 0.5  # patch in row 1, column 3
    differs = (vae.encode(changed).latent_dist.mean - latents).abs().amax(dim=(0, 1)) > 1e-3
    assert differs.nonzero().tolist() == [[1, 3]]


@torch.no_grad()
def test_distribution_has_no_variance(vae: PatchAutoencoder, images: torch.Tensor):
    distribution = vae.encode(images[:2]).latent_dist
    assert torch.equal(distribution.sample(), distribution.mean)
    assert torch.equal(distribution.mode(), distribution.mean)


def test_sides_must_be_multiples_of_the_patch_size(vae: PatchAutoencoder):
    with pytest.raises(ValueError, match="60x64 pixels: its sides must be multiples of 8"):
        vae.encode(torch.zeros(1, 3, 60, 64))


def test_state_dict_keys_and_shapes_are_a_contract():
    shapes = {name: tuple(values.shape) for name, values in load_file(DEMO_VAE / SAFETENSORS).items()}
    assert shapes == {
        "encoder.weight": (16, 3, 8, 8),
        "encoder.bias": (16,),
        "decoder.weight": (16, 3, 8, 8),
        "decoder.bias": (3,),
    }


def test_command_writes_the_packaged_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["patch_vae", str(tmp_path)])
    monkeypatch.delitem(sys.modules, "pixart.demo.patch_vae")  # runpy warns if the module is already imported
    runpy.run_module("pixart.demo.patch_vae", run_name="__main__")
    written, packaged = load_file(tmp_path / SAFETENSORS), load_file(DEMO_VAE / SAFETENSORS)
    for name, values in packaged.items():
        torch.testing.assert_close(written[name], values, rtol=0, atol=1e-4)
    written, packaged = PatchAutoencoder.load_config(tmp_path), PatchAutoencoder.load_config(DEMO_VAE)
    assert {**written, "_diffusers_version": packaged["_diffusers_version"]} == packaged
