"""Estimates of what jobs ask for and write: GPU hours, and bytes on disk.

They are made from the configuration, and from the finished shards of a dataset where there are any.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.state import ledger
from pixart.config.model_costs import Operations, num_parameters, text_encoder_operations, training_operations
from pixart.config.recipe import Recipe
from pixart.gpu_rates import PEAK_TFLOPS, Card, gpu_hours
from slurm.profile import Profile, for_kind
from slurm.sbatch import Shape

LATENT_DOWNSAMPLING = 8  # side of the image area of one latent pixel, of the demo's and Stable Diffusion's autoencoders
FLOAT16_BYTES, TOKEN_BYTES, MASK_BYTES = 2, 4, 1
SCALAR_BYTES = 5  # of a row's label and of whether it is valid
CHUNK_BYTES = 20  # of the checksum and the index entry that each row of an array has
CAPTION_BYTES = 1000  # of a caption and its other columns in a parquet part, unless a shard is finished
TEXT_DIM = 2048  # of T5Gemma-XL's embeddings, unless the text encoder or the dataset is on disk
STATE_BYTES = 4 * 4  # per parameter: float32 weights, EMA weights and two moments
MEASURED_SHARDS = 16  # at most, whose files and durations are read


def requested_gpu_hours(profile: Profile, shape: Shape) -> float | None:
    """Return the GPU hours that a submission asks for, up to its time limits; None without a time limit."""
    profile = for_kind(profile, shape.kind)
    minutes = profile.minutes.get(shape.kind)
    return None if minutes is None else max(1, len(shape.tasks)) * shape.nodes * shape.gpus_per_node * minutes / 60


def latent_shape(recipe: Recipe, manifest: dict[str, Any] | None) -> tuple[int, int, int]:
    """Return the shape (channels, height, width) of the latent of a square image."""
    side = recipe.data.image_size // LATENT_DOWNSAMPLING
    channels, height, width = manifest["latent_shape"] if manifest else (recipe.model.in_dim, side, side)
    return channels, height, width


def row_bytes(recipe: Recipe, kind: str, manifest: dict[str, Any] | None) -> float:
    """Return the bytes that a job of this kind writes for one image; 0 for other kinds than data jobs."""
    data = recipe.data
    if kind == "caption":
        return CAPTION_BYTES
    if kind not in ("latents", "adopt"):
        return 0
    channels, height, width = latent_shape(recipe, manifest)
    latents = channels * height * width * FLOAT16_BYTES + CHUNK_BYTES
    text = data.max_text_tokens * (TOKEN_BYTES + MASK_BYTES) + 2 * CHUNK_BYTES
    if data.store_text_embeddings:
        text += data.max_text_tokens * text_dim(recipe, manifest) * FLOAT16_BYTES + CHUNK_BYTES
    return latents + SCALAR_BYTES + text * (2 if data.short_captions else 1)


def text_dim(recipe: Recipe, manifest: dict[str, Any] | None) -> int:
    """Return the width of the text embeddings: of the dataset, of the encoder on disk, or else TEXT_DIM."""
    if manifest:
        return manifest["text_dim"]
    from pixart.data.encoders import text_encoder

    folder = encoder_folder(recipe.data.text_encoder)
    return text_encoder.text_dim(str(folder)) if folder else TEXT_DIM


def encoder_folder(name: str) -> Path | None:
    """Return the folder of a text encoder; None if it is not on disk."""
    from pixart.data.encoders.text_encoder import encoder_path
    from pixart.data.encoders.vae import cached_folder

    path = encoder_path(name)
    return Path(path) if Path(path).exists() else cached_folder(path)


def num_images(recipe: Recipe, manifest: dict[str, Any] | None) -> int | None:
    """Return the number of a dataset's images; None if it is neither created nor limited."""
    return manifest["images"] if manifest else recipe.data.max_images


def dataset_bytes(recipe: Recipe) -> float | None:
    """Return the bytes of a whole dataset; None if its number of images is not known."""
    manifest = ledger.manifest(recipe.data.path)
    images = num_images(recipe, manifest)
    return (
        None if images is None else images * sum(row_bytes(recipe, kind, manifest) for kind in ("caption", "latents"))
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What finished shards of a job took for one row, on average."""

    shards: int
    row_bytes: float
    row_seconds: float


def measure(dataset: str, kind: str) -> Measured | None:
    """Return the bytes and seconds per row of up to MEASURED_SHARDS finished shards on this machine; None without any.

    The bytes are those of caption parts; arrays have the size that `row_bytes` computes.
    """
    shards = sorted(ledger.shards(dataset, kind))[:MEASURED_SHARDS]
    entries = ledger.entries(dataset, kind, shards)
    rows = sum(entry.rows for entry in entries.values())
    if not rows:
        return None
    folder, suffix = ledger.DATA_FOLDERS[kind]
    files = [Path(dataset, folder, f"{shard:05d}{suffix}") for shard in entries]
    size = sum(file.stat().st_size for file in files if file.exists())
    seconds = sum(entry.seconds for entry in entries.values())
    return Measured(shards=len(entries), row_bytes=size / rows, row_seconds=seconds / rows)


def image_operations(recipe: Recipe, stage: int, manifest: dict[str, Any] | None) -> Operations:
    """Return the operations of one image in a stage, with those of the text encoder if it runs in every step."""
    from pixart.data.encoders.text_encoder import encoder_config

    _, height, width = latent_shape(recipe, manifest)
    data = recipe.data
    operations = training_operations(
        recipe.model, stage, height * width, data.max_text_tokens, text_dim(recipe, manifest)
    )
    folder = None if stage == 1 or data.store_text_embeddings else encoder_folder(data.text_encoder)
    encoder = text_encoder_operations(encoder_config(str(folder)), data.max_text_tokens) if folder else 0
    return Operations(block_linears=operations.block_linears, other=operations.other + encoder)


def stage_gpu_hours(recipe: Recipe, stage: int, operations: Operations, card: Card, utilization: float) -> float:
    """Return the hours that one GPU takes for a stage at a share `utilization` of its peak.

    In FP8 the blocks' linears have the rate of FP8 if the card has one.
    """
    config, peaks = recipe.train(stage), PEAK_TFLOPS[card]
    rate = peaks["bf16" if config.precision == "bf16" else "fp32"]
    linear_rate = peaks.get("fp8", rate) if config.fp8 else rate
    image = gpu_hours(operations.block_linears, linear_rate, utilization) + gpu_hours(
        operations.other, rate, utilization
    )
    return config.steps * config.global_batch_size * image


def checkpoint_bytes(recipe: Recipe, stage: int, manifest: dict[str, Any] | None) -> float:
    """Return about how large a checkpoint of a stage is, in bytes."""
    return STATE_BYTES * num_parameters(recipe.model, stage, text_dim(recipe, manifest))


def num_checkpoints(recipe: Recipe, stage: int) -> tuple[int, int]:
    """Return how many checkpoints a stage writes, and how many of them remain."""
    config = recipe.train(stage)
    written = -(-config.steps // config.save_every)
    kept = min(written, config.keep_last + (config.steps // config.keep_every if config.keep_every else 0))
    return written, kept


def kept_checkpoint_bytes(recipe: Recipe, stage: int) -> float:
    """Return the bytes of the checkpoints that remain after a stage."""
    return num_checkpoints(recipe, stage)[1] * checkpoint_bytes(recipe, stage, ledger.manifest(recipe.data.path))


def written(recipe: Recipe, shape: Shape, stage: int | None = None) -> str:
    """Describe what a submission writes; `stage` is that of training."""
    manifest = ledger.manifest(recipe.data.path)
    if shape.kind == "train" and stage:
        count, kept = num_checkpoints(recipe, stage)
        size = checkpoint_bytes(recipe, stage, manifest)
        return f"{terabytes(count * size)} in {count} checkpoints, of which {kept} remain ({terabytes(kept * size)})"
    images = num_images(recipe, manifest)
    size = row_bytes(recipe, shape.kind, manifest)
    if not size:
        return "less than 0.001 TB"
    if images is None:
        return f"{size / 1024:.1f} KiB for each image"
    return terabytes(images * size * len(shape.elements) / recipe.data.num_shards)


def terabytes(count: float) -> str:
    """Return a number of bytes in TB, with three significant digits."""
    return f"{count / 1e12:.3g} TB" if count >= 1e9 else "less than 0.001 TB"
