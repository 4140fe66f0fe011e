"""Estimate the bytes on disk and the GPU hours of a recipe.

Bytes follow from the configuration. Operations of training are counted, and take their time at a share of a named GPU's
peak. Captioning and encoding are extrapolated from the finished shards of the dataset.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from jobs.commands.launching import read_recipe
from jobs.commands.options import Command, RecipeOptions, fraction, option, positive
from jobs.commands.tables import print_table
from jobs.state import ledger
from jobs.state import run as runs
from jobs.submission import estimates
from pixart.config.dataset import is_url
from pixart.config.recipe import Recipe
from pixart.gpu_rates import Card

DEFAULT_CARD: Card = "B200"
DEFAULT_UTILIZATION = 0.35
UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True)
class Options(RecipeOptions):
    """The options of `estimate`."""

    card: Literal["A100", "H100", "H200", "B200"] = option(
        "--card",
        metavar="GPU",
        default=DEFAULT_CARD,
        help=f"GPU whose peak rates are taken: A100, H100, H200 or B200 (default: {DEFAULT_CARD}).",
    )
    utilization: float = option(
        "--utilization",
        metavar="SHARE",
        default=DEFAULT_UTILIZATION,
        convert=fraction,
        help=f"Share of the peak that training reaches, above 0 and at most 1 (default: {DEFAULT_UTILIZATION}).",
    )
    gpus: int = option(
        "--gpus", metavar="N", default=8, convert=positive, help="Number of GPUs that share the work (default: 8)."
    )


def run(options: Options) -> int:
    recipe = read_recipe(runs.home(options.home), options)
    manifest = ledger.manifest(recipe.data.path)
    images = estimates.num_images(recipe, manifest)
    if images is None:
        raise ValueError(
            "the number of images is not known; give --set data.max_images=N, or the --dataset of a created dataset"
        )
    peak = f"{options.gpus} {options.card} at {options.utilization:.0%} of their peak"
    print(f"{recipe.name}: {images:,} images of {recipe.data.image_size} pixels; {peak}\n")
    print_table(("data", "bytes", "GPU hours", "basis"), list(data_rows(recipe, manifest, images)))
    print()
    header = ("training", "steps", "images", "operations of an image", "GPU hours", "hours", "checkpoints", "bytes")
    print_table(header, [training_row(recipe, manifest, stage, options) for stage in (1, 2)])
    encoder = recipe.data.text_encoder
    if not recipe.data.store_text_embeddings and not estimates.encoder_folder(encoder):
        print(f"\nStage 2 is without the operations of {encoder}, which is not on disk; run 'doctor --fetch' first.")
    return 0


def data_rows(recipe: Recipe, manifest: dict[str, Any] | None, images: int) -> Iterator[tuple[str, ...]]:
    """Yield the cells of each data job."""
    for kind in ("caption", "latents"):
        measured = None if is_url(recipe.data.path) else estimates.measure(recipe.data.path, kind)
        row_bytes = estimates.row_bytes(recipe, kind, manifest)
        hours, basis = UNKNOWN, f"no shard is finished; run '{kind} --array 0' and estimate again"
        if measured:
            row_bytes = measured.row_bytes if kind == "caption" else row_bytes
            hours = number(images * measured.row_seconds / 3600)
            basis = f"{measured.shards} finished shards, {1 / max(measured.row_seconds, 1e-9):.3g} images/s per task"
        yield (kind, size(images * row_bytes), hours, f"{size(row_bytes)} for an image; {basis}")


def training_row(recipe: Recipe, manifest: dict[str, Any] | None, stage: int, options: Options) -> tuple[str, ...]:
    """Return the cells of a stage."""
    config = recipe.train(stage)
    operations = estimates.image_operations(recipe, stage, manifest)
    hours = estimates.stage_gpu_hours(recipe, stage, operations, options.card, options.utilization)
    written, kept = estimates.num_checkpoints(recipe, stage)
    checkpoint = estimates.checkpoint_bytes(recipe, stage, manifest)
    return (
        f"stage {stage}, {'FP8' if config.fp8 else config.precision.upper()}",
        f"{config.steps:,}",
        f"{config.steps * config.global_batch_size:,}",
        f"{operations.total / 1e12:.4g} TFLOP",
        number(hours),
        number(hours / options.gpus),
        f"{kept} of {written:,} kept",
        f"{size(checkpoint)} each, {size(kept * checkpoint)} in all",
    )


def number(value: float) -> str:
    """Return a number with three significant digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def size(count: float) -> str:
    """Return a number of bytes with three significant digits and its decimal unit."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB" if count < 1000 else f"{count:,.0f} TB"


COMMAND = Command(Options, run)
