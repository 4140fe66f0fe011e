"""Encoding of images to latents and decoding, with any diffusers autoencoder.

The pixel range is the range of values that uint8 images are mapped to before encoding, and that decoded values are
clamped to: [-1, 1], which published autoencoders are trained with, or [0, 1].
"""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pixart import records

DEMO_VAE = Path(__file__).parents[2] / "demo" / "demo_vae"


def read_config(name: str, file: str = "config.json") -> dict[str, Any]:
    """Read the configuration of a model folder, or of `owner/model/subfolder` on the hub.

    Raises ValueError if the name is neither.
    """
    folder = Path(name)
    if (folder / file).is_file():
        return records.read(folder / file, dict[str, Any])
    repository, subfolder = split_hub_name(name)
    try:
        from huggingface_hub import hf_hub_download

        downloaded = Path(hf_hub_download(repository, file, subfolder=subfolder))
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{name!r} is neither a model folder nor a model on the hub: {reason}") from error
    return records.read(downloaded, dict[str, Any])


def split_hub_name(name: str) -> tuple[str, str | None]:
    """Split `owner/model/sub/folder` into `owner/model` and `sub/folder`, or None without a subfolder."""
    parts = name.split("/")
    return "/".join(parts[:2]), "/".join(parts[2:]) or None


def cached_folder(name: str) -> Path | None:
    """Return the folder of a hub model in the cache on disk; None if nothing of it was downloaded."""
    from huggingface_hub import try_to_load_from_cache

    repository, subfolder = split_hub_name(name)
    config = try_to_load_from_cache(repository, f"{subfolder}/config.json" if subfolder else "config.json")
    return Path(config).parent if isinstance(config, str) else None


def vae_path(name: str) -> str:
    """Return the folder or hub name of a VAE; `demo` is the autoencoder in `pixart/demo`."""
    return str(DEMO_VAE) if name == "demo" else name


def latent_channels(name: str) -> int:
    """Return the number of channels of a VAE's latents."""
    return read_config(vae_path(name))["latent_channels"]


def downsampling_factor(name: str) -> int:
    """Return the side of the image area that one latent pixel stands for, in pixels."""
    config = read_config(vae_path(name))
    return config["patch_size"] if "patch_size" in config else 2 ** (len(config["block_out_channels"]) - 1)


def latent_shape(name: str, image_size: int) -> tuple[int, int, int]:
    """Return the shape (channels, height, width) of the latents of square images of `image_size` pixels.

    Raises ValueError if the VAE cannot encode this size.
    """
    factor = downsampling_factor(name)
    if image_size % factor:
        raise ValueError(f"data.image_size={image_size}: must be a multiple of {factor}, the VAE's downsampling factor")
    return latent_channels(name), image_size // factor, image_size // factor


@cache
def load_vae(name: str):
    """Load a frozen diffusers autoencoder by `demo`, folder or hub name, on the GPU if there is one."""
    import torch
    from diffusers import AutoencoderKL

    from pixart.demo.patch_vae import PatchAutoencoder

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "demo":
        vae = PatchAutoencoder.from_pretrained(DEMO_VAE, low_cpu_mem_usage=False)
    elif Path(name).is_dir():
        vae = AutoencoderKL.from_pretrained(name, low_cpu_mem_usage=False)
    else:
        repository, subfolder = split_hub_name(name)
        vae = AutoencoderKL.from_pretrained(repository, subfolder=subfolder, low_cpu_mem_usage=False)
    return vae.requires_grad_(False).eval().to(device)


def encode(vae, images: np.ndarray, pixel_range: tuple[int, int]) -> np.ndarray:
    """Encode uint8 images (B, H, W, 3) to latent means, float16 (B, C, h, w), without scaling factor."""
    import torch

    low, high = pixel_range
    with torch.no_grad():
        pixels = torch.from_numpy(images).to(vae.device).permute(0, 3, 1, 2).to(vae.dtype) / (255 / (high - low)) + low
        return vae.encode(pixels).latent_dist.mean.to(torch.float16).cpu().numpy()


def decode(vae, latents, pixel_range: tuple[int, int]) -> np.ndarray:
    """Decode latents (B, C, h, w), an array or a tensor without scaling factor, to uint8 images (B, H, W, 3)."""
    import torch

    low, high = pixel_range
    with torch.no_grad():
        pixels = vae.decode(torch.as_tensor(latents).to(vae.device, vae.dtype)).sample
        pixels = (pixels.float().clamp(low, high) - low) * (255 / (high - low))
        return pixels.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
