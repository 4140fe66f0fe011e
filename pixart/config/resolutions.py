"""Sizes of images, those that a checkpoint was trained at and those to sample, and the time shift by resolution.

Shapes are (height, width) in pixels. An image with more latent pixels needs more noise to hide as much of it (Stable
Diffusion 3, section 5.3.2, arXiv:2403.03206): a shift s maps the noise level sigma, which is 1 for noise and 0 for
data, to s * sigma / (1 + (s - 1) * sigma). Imports nothing heavy, so that the launcher can use it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pixart.config.aspect_buckets import WIDTH_AND_HEIGHT, Shape

AUTO = "auto"
UNSHIFTED = "1"  # of records from before the key existed


def check_time_shift(setting: str) -> None:
    """Raise ValueError unless a setting is `auto` or a positive number."""
    if setting == AUTO:
        return
    try:
        shift = float(setting)
    except ValueError:
        shift = math.nan
    if not 0 < shift < math.inf:
        raise ValueError(f"time_shift={setting}: must be {AUTO} or a positive number")


def time_shift(setting: str, height: int, width: int, base_latent_size: int) -> float:
    """Return the shift of latents of height x width; with `auto`, sqrt(height * width) / base_latent_size."""
    return math.sqrt(height * width) / base_latent_size if setting == AUTO else float(setting)


def recorded_time_shift(record: Mapping[str, Any]) -> str:
    """Return the setting that a checkpoint was trained with, by its record."""
    return record.get("provenance", {}).get("time_shift", UNSHIFTED)


def trained_shapes(record: Mapping[str, Any]) -> tuple[list[Shape], int]:
    """Return the shapes that a checkpoint was trained at, by its record, and the VAE's downsampling factor.

    A checkpoint from before they were recorded has no shapes, and the factor 1.
    """
    provenance = record.get("provenance", {})
    shapes = [(height, width) for height, width in provenance.get("image_shapes", [])]
    return shapes, provenance.get("downsampling_factor", 1)


def nearest_to_square(shapes: Sequence[Shape]) -> Shape:
    """Return the shape whose sides are most equal; of several the largest."""
    return min(shapes, key=lambda shape: (abs(math.log(shape[0] / shape[1])), -math.prod(shape)))


def parse_size(text: str) -> Shape:
    """Return the shape of a text WIDTHxHEIGHT. Raises ValueError for another text."""
    match = WIDTH_AND_HEIGHT.fullmatch(text)
    shape = (int(match[2]), int(match[1])) if match else (0, 0)
    if not all(shape):
        raise ValueError("must be WIDTHxHEIGHT in pixels, such as 1024x768")
    return shape


def describe_sizes(shapes: Sequence[Shape]) -> str:
    """Return shapes as `WIDTHxHEIGHT, ...`."""
    return ", ".join(f"{width}x{height}" for height, width in shapes)


def check_trained(shapes: Sequence[Shape], trained: Sequence[Shape], checkpoint: str) -> None:
    """Raise ValueError for a shape that a checkpoint was not trained at."""
    for height, width in shapes:
        if (height, width) not in trained:
            raise ValueError(
                f"--size {width}x{height}: {checkpoint} was not trained at this size, but at "
                f"{describe_sizes(trained)}; give one of them, or add --force-size"
            )


def check_multiples(shapes: Sequence[Shape], multiple: int) -> None:
    """Raise ValueError for a shape with a side that is no multiple of the side of a patch in pixels."""
    for height, width in shapes:
        if height % multiple or width % multiple:
            raise ValueError(
                f"--size {width}x{height}: both sides must be multiples of {multiple}, the VAE's downsampling factor "
                "times the patch size"
            )
