"""Comparison of the latents that a checkpoint was trained on with those of a dataset. Imports no torch."""

from collections.abc import Mapping, Sequence
from typing import Any

from pixart.config.dataset import PIXEL_RANGES

DEFAULT_PIXEL_RANGE = PIXEL_RANGES[0]
# Of the original training's normalization, latent * 1.5305 - 0.177456, for which checkpoints of version 0.1 do not
# record that its latents are of pixels in [0, 1].
ORIGINAL_MEAN, ORIGINAL_PIXEL_RANGE = 0.177456 / 1.5305, PIXEL_RANGES[1]


def recorded_pixel_range(metadata: Mapping[str, Any]) -> tuple[int, int]:
    """Return the pixel range in a checkpoint's metadata.

    Metadata of version 0.1 has none: datasets of that version have the default range, and a checkpoint that was
    converted from a file of the original training, and not trained since, has that of the original training.
    """
    normalization = metadata["normalization"]
    if "pixel_range" in normalization:
        low, high = normalization["pixel_range"]
        return low, high
    is_original = metadata.get("dataset") is None and set(normalization["mean"]) == {ORIGINAL_MEAN}
    return ORIGINAL_PIXEL_RANGE if is_original else DEFAULT_PIXEL_RANGE


def check_latent_space(
    checkpoint: str,
    pixel_range: tuple[int, int],
    models: Mapping[str, str],
    dataset: str,
    dataset_pixel_range: tuple[int, int],
    dataset_models: Mapping[str, str],
) -> None:
    """Check that a checkpoint and a dataset have latents of the same pixel range and the same models.

    `models` has the fingerprints of the models that the checkpoint records; an imported one records none. Raises
    ValueError with both values, and what to do, where they differ.
    """
    if pixel_range != dataset_pixel_range:
        raise ValueError(
            f"data.pixel_range: the latents of {checkpoint} are of pixels in {list(pixel_range)}, those of the dataset "
            f"{dataset} in {list(dataset_pixel_range)}; use a dataset that was created with "
            f"--set data.pixel_range={','.join(map(str, pixel_range))}"
        )
    for kind, fingerprint in models.items():
        if fingerprint != dataset_models[kind]:
            raise ValueError(
                f"data.{kind}: {checkpoint} was trained with another {NAMES[kind]} (fingerprint {fingerprint}) than "
                f"that of the dataset {dataset} (fingerprint {dataset_models[kind]}); use a dataset that was created "
                f"with the same {NAMES[kind]}"
            )


def check_image_shapes(
    run: str, provenance: Mapping[str, Any], dataset: str, dataset_shapes: Sequence[tuple[int, int]]
) -> None:
    """Check that a run is resumed on images of the (height, width) that the provenance of its checkpoint records.

    The order of training depends on the aspect buckets. That of before they existed records none. Raises
    ValueError for other shapes.
    """
    recorded = provenance.get("image_shapes")
    if recorded and [tuple(shape) for shape in recorded] != list(dataset_shapes):
        raise ValueError(
            f"data.aspect_buckets: the run {run} was trained on images of {describe_shapes(recorded)}, those of the "
            f"dataset {dataset} are of {describe_shapes(dataset_shapes)}; resume with its own dataset, or start "
            "another run by --from"
        )


def describe_shapes(shapes: Sequence[Sequence[int]]) -> str:
    """Return the widths and heights of (height, width) shapes, at most four of them."""
    listed = ", ".join(f"{width}x{height}" for height, width in shapes[:4])
    return f"{listed} and {len(shapes) - 4} more" if len(shapes) > 4 else listed


NAMES = {"vae": "VAE", "text_encoder": "text encoder"}
