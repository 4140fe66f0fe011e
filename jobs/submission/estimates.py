"""Estimates of what jobs ask for and write, from the configuration alone: GPU hours, and bytes on disk."""

from typing import Any

from jobs.state import ledger
from pixart.config.recipe import Recipe
from slurm.profile import Profile, for_kind
from slurm.sbatch import Shape

LATENT_DOWNSAMPLING = 8  # side of the image area of one latent pixel, of the demo's and Stable Diffusion's autoencoders
FLOAT16_BYTES, TOKEN_BYTES = 2, 5  # a token is an int32 and a bool of its mask
TEXT_BYTES = 1000  # of a caption and its other columns in a parquet part
STATE_BYTES = 4 * 4  # per parameter: float32 weights, EMA weights and two moments


def gpu_hours(profile: Profile, shape: Shape) -> float | None:
    """Return the GPU hours that a submission asks for, up to its time limits; None without a time limit."""
    profile = for_kind(profile, shape.kind)
    minutes = profile.minutes.get(shape.kind)
    return None if minutes is None else max(1, len(shape.tasks)) * shape.nodes * shape.gpus_per_node * minutes / 60


def row_bytes(recipe: Recipe, kind: str, manifest: dict[str, Any] | None) -> float:
    """Return the bytes that a job of this kind writes for one image; 0 for other kinds than data jobs."""
    data = recipe.data
    if kind == "caption":
        return TEXT_BYTES
    if kind not in ("latents", "adopt"):
        return 0
    side = data.image_size // LATENT_DOWNSAMPLING
    channels, height, width = manifest["latent_shape"] if manifest else (recipe.model.in_dim, side, side)
    tokens = data.max_text_tokens * (2 if data.short_captions else 1)
    states = tokens * manifest["text_dim"] * FLOAT16_BYTES if manifest and data.store_text_embeddings else 0
    return channels * height * width * FLOAT16_BYTES + tokens * TOKEN_BYTES + states


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


def num_parameters(recipe: Recipe, stage: int) -> int:
    """Return about how many parameters the transformer has: its linears, without biases, norms and embeddings.

    A block has 4 matrices of attention, in stage 2 another 4 of cross-attention, 2 of the MLP, and in stage 1 its own
    modulation, a (cond_dim, dim) and a (dim, 6 dim) linear, which stage 2 shares among the blocks.
    """
    model = recipe.model
    square, modulation = model.dim**2, model.cond_dim * model.dim + 6 * model.dim**2
    block = (4 + 2 * model.mlp_ratio + (4 if stage == 2 else 0)) * square
    return model.num_blocks * block + modulation * (1 if stage == 2 else model.num_blocks)


def checkpoint_bytes(recipe: Recipe, stage: int) -> float:
    """Return about how large a checkpoint of a stage is, in bytes."""
    return STATE_BYTES * num_parameters(recipe, stage)


def num_checkpoints(recipe: Recipe, stage: int) -> tuple[int, int]:
    """Return how many checkpoints a stage writes, and how many of them remain."""
    config = recipe.train(stage)
    written = -(-config.steps // config.save_every)
    kept = min(written, config.keep_last + (config.steps // config.keep_every if config.keep_every else 0))
    return written, kept


def kept_checkpoint_bytes(recipe: Recipe, stage: int) -> float:
    """Return the bytes of the checkpoints that remain after a stage."""
    return num_checkpoints(recipe, stage)[1] * checkpoint_bytes(recipe, stage)


def written(recipe: Recipe, shape: Shape, stage: int | None = None) -> str:
    """Describe what a submission writes; `stage` is that of training."""
    if shape.kind == "train" and stage:
        count, kept = num_checkpoints(recipe, stage)
        size = checkpoint_bytes(recipe, stage)
        return f"{terabytes(count * size)} in {count} checkpoints, of which {kept} remain ({terabytes(kept * size)})"
    manifest = ledger.manifest(recipe.data.path)
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
