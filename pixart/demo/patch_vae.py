"""The demo's autoencoder: the first 16 principal components of 8x8 patches, with the interface of AutoencoderKL.

It has 25 KB of weights and fits in seconds, so the demo uses the same code path as a real autoencoder without a
download. `python -m pixart.demo.patch_vae DIRECTORY` fits and saves it.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import nn

from pixart.demo.scenes import make_scene, render

DEMO_VAE = Path(__file__).parent / "demo_vae"  # the fitted weights in the package, for `from_pretrained`


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """A linear autoencoder of patches: one convolution and one transposed convolution.

    As with AutoencoderKL, a diffusion model is trained on `(latents - config.shift_factor) * config.scaling_factor`,
    which has standard deviation 1.
    """

    @register_to_config
    def __init__(
        self, latent_channels: int = 16, patch_size: int = 8, scaling_factor: float = 1.0, shift_factor: float = 0.0
    ) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, latent_channels, patch_size, stride=patch_size)
        self.decoder = nn.ConvTranspose2d(latent_channels, 3, patch_size, stride=patch_size)

    def encode(self, images: torch.Tensor) -> AutoencoderKLOutput:
        """Encode images in [-1, 1], (batch, 3, height, width), to latents (batch, 16, height / 8, width / 8).

        The distribution in `latent_dist` is deterministic: its mean, mode and samples are equal.
        Raises ValueError if a side is not a multiple of the patch size.
        """
        height, width = images.shape[-2:]
        patch_size = self.config.patch_size
        if height % patch_size or width % patch_size:
            raise ValueError(f"image of {height}x{width} pixels: its sides must be multiples of {patch_size}")
        mean = self.encoder(images)
        parameters = torch.cat([mean, torch.zeros_like(mean)], dim=1)  # mean and log-variance
        return AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(parameters, deterministic=True))

    def decode(self, latents: torch.Tensor) -> DecoderOutput:
        """Decode latents (batch, 16, height / 8, width / 8) to images near [-1, 1], not clamped, in `sample`."""
        return DecoderOutput(sample=self.decoder(latents))


def fit(num_scenes: int = 2048, seed: int = 1) -> PatchAutoencoder:
    """Fit the autoencoder to the first `num_scenes` scenes of a seed. The result is deterministic."""
    vae = PatchAutoencoder()
    channels, patch_size = vae.config.latent_channels, vae.config.patch_size
    images = np.stack([render(make_scene(seed, index)) for index in range(num_scenes)]) / 127.5 - 1
    rows = images.shape[1] // patch_size
    patches = images.reshape(num_scenes, rows, patch_size, rows, patch_size, 3).transpose(0, 1, 3, 5, 2, 4)
    color = patches.mean(axis=(0, 1, 2, 4, 5))  # the decoder's bias is one color, not a patch
    patches = (patches - color[:, None, None]).reshape(-1, 3 * patch_size**2)  # (patches, 192)

    variances, vectors = np.linalg.eigh(patches.T @ patches / len(patches))  # ascending
    deviations = np.sqrt(variances[::-1][:channels])
    components = vectors.T[::-1][:channels]  # (16, 192)
    # The sign of an eigenvector is arbitrary: choose the one that is positive along a fixed direction.
    direction = np.random.default_rng(0).standard_normal(components.shape[1])
    components = components * np.sign(components @ direction)[:, None]

    # Dividing by the standard deviation would give the last component the same weight in the diffusion loss as the
    # first; not dividing would drown the last ones in noise. The square root is a compromise.
    scales = np.sqrt(deviations)[:, None]
    kernel_shape = (channels, 3, patch_size, patch_size)
    encoder = (components / scales).reshape(kernel_shape)
    state = {
        "encoder.weight": encoder,
        "encoder.bias": -(encoder.sum(axis=(2, 3)) @ color),
        "decoder.weight": (components * scales).reshape(kernel_shape),
        "decoder.bias": color,
    }
    vae.load_state_dict({name: torch.from_numpy(value).float() for name, value in state.items()})
    latent_deviation = (patches @ (components / scales).T).std()
    vae.register_to_config(scaling_factor=round(float(1 / latent_deviation), 6))
    return vae.eval()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Fit the demo's autoencoder and save it.")
    parser.add_argument("directory", type=Path, help="Directory in which to save the weights and config.json.")
    fit().save_pretrained(parser.parse_args().directory)
