"""Compare training at 128, then 192, then 256 pixels with training at 256 pixels alone, on scenes of three shapes.

`python -m benchmarks.growing_sizes FOLDER` renders the demo's scenes as squares and as wide and tall images, trains
stage 2 from new weights in both ways, counts the prompts whose images show the right color and shape at 256 pixels, and
writes a table to `benchmarks/results/`. Each size has STEPS steps, training at 256 pixels alone twice as many, which
process a tenth more tokens in all.
"""

import argparse
import dataclasses
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import measure
from jobs.tasks import caption, init_dataset, latents
from pixart.config.recipe import Recipe, to_json
from pixart.data import manifest as manifests
from pixart.demo.scene_scorer import SceneAccuracy, score
from pixart.demo.scenes import Scene, make_scene, render
from pixart.demo.scenes import caption as describe
from pixart.recipes import demo
from pixart.sampling.images import SampleRequest, generate
from pixart.sampling.loading import load_pipeline
from pixart.training.loop import train

SIZES = (128, 192, 256)
SHAPES = ((1, 1), (5 / 4, 3 / 4), (3 / 4, 5 / 4))  # widths and heights, relative to the side of the square
PATCH = 16  # pixels
SHARDS, PROMPT_SEED = 8, 1  # the scenes of the prompts are of another series than those of training


def buckets(size: int) -> list[tuple[int, int]]:
    """Return the widths and heights of the three shapes at a size, in pixels."""
    return [(round(width * size / PATCH) * PATCH, round(height * size / PATCH) * PATCH) for width, height in SHAPES]


def picture(scene: Scene, width: int, height: int) -> np.ndarray:
    """Render a scene in the middle of an image, uint8 (height, width, 3), which its background fills."""
    side = min(width, height)
    square = render(scene, side)
    margins = ((height - side) // 2, (width - side) // 2)
    return np.pad(square, [*((margin, margin) for margin in margins), (0, 0)], mode="edge")


def write_scenes(folder: Path, count: int) -> None:
    """Write scenes at the largest size with their captions, in the three shapes by turns."""
    folder.mkdir(parents=True)
    for index in range(count):
        scene, (width, height) = make_scene(0, index), buckets(SIZES[-1])[index % len(SHAPES)]
        Image.fromarray(picture(scene, width, height)).save(folder / f"{index:05}.png", compress_level=1)
        (folder / f"{index:05}.txt").write_text(describe(scene))


def datasets(folder: Path, options: argparse.Namespace) -> list[Recipe]:
    """Create a dataset for each size, of which the first is captioned, and return the recipes."""
    if not (folder / "images").exists():
        write_scenes(folder / "images", options.images)
    base = demo(str(folder))
    watched = {"validate_every": 0, "num_validation_samples": 0, "preview_every": 0}
    stage2 = dataclasses.replace(
        base.stage2,
        fp8=False,
        global_batch_size=options.batch,
        lr=options.lr,
        warmup_steps=min(40, options.steps // 4),
        **watched,
    )
    model = dataclasses.replace(base.model, base_latent_size=SIZES[0] // 8)
    recipes: list[Recipe] = []
    for size in SIZES:
        data = dataclasses.replace(
            base.data,
            path=str(folder / f"scenes-{size}"),
            source=str(folder / "images"),
            max_images=None,
            num_shards=SHARDS,
            image_size=size,
            aspect_buckets=",".join(f"{width}x{height}" for width, height in buckets(size)),
        )
        recipe = dataclasses.replace(base, data=data, model=model, stage2=stage2)
        if not Path(data.path).exists():
            if recipes:
                init_dataset.resize(to_json(recipe), recipes[0].data.path)
            else:
                init_dataset.run(to_json(recipe))
                caption.run(data.path, list(range(SHARDS)))
            latents.run(data.path, list(range(SHARDS)))
        recipes.append(recipe)
    return recipes


def trained(recipe: Recipe, run: Path, steps: int, start: Path | None) -> tuple[Path, float]:
    """Train stage 2 until a number of steps, and return the checkpoint and the seconds."""
    begun = time.perf_counter()
    config = dataclasses.replace(recipe.stage2, steps=steps, save_every=steps)
    checkpoint = train(stage=2, model=recipe.model, config=config, dataset=recipe.data.path, run=run, start=start)
    return checkpoint, time.perf_counter() - begun


def counted(checkpoint: Path, recipe: Recipe, prompts: int) -> SceneAccuracy:
    """Return the share of prompts whose images, of the three shapes at the last size, show their scene."""
    scenes = [make_scene(PROMPT_SEED, index) for index in range(prompts // len(SHAPES) * len(SHAPES))]
    requests = [SampleRequest(seed=index, prompt=describe(scene)) for index, scene in enumerate(scenes)]
    shapes = [(height, width) for width, height in buckets(SIZES[-1])]
    pipeline = load_pipeline(checkpoint, "ema", manifests.read(recipe.data.path))
    images = generate(pipeline, requests, steps=recipe.sample.steps, guidance=recipe.sample.guidance, shapes=shapes)
    return score([np.asarray(image) for image in images], scenes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=600, help="Steps at each size (default: %(default)s).")
    parser.add_argument("--images", type=int, default=3072)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=4e-3)
    options = parser.parse_args()
    recipes = datasets(options.folder, options)
    page = measure.Page(
        measure.RESULTS,
        "growing-sizes",
        [
            f"# Training at {', '.join(map(str, SIZES))} pixels in turn, and at {SIZES[-1]} alone",
            "",
            f"Stage 2 from new weights in float32, {options.images:,} scenes of three shapes, batch {options.batch}, "
            f"learning rate {options.lr:g}. Of {options.prompts} prompts that training has not seen, the images at "
            f"{SIZES[-1]} pixels.",
        ],
        ("training", "steps", "seconds", "main color right", "main shape right"),
    )
    checkpoint, elapsed = None, 0.0
    for number, (size, recipe) in enumerate(zip(SIZES, recipes, strict=True), 1):
        checkpoint, taken = trained(recipe, options.folder / f"run-{size}", number * options.steps, checkpoint)
        elapsed += taken
    arms = [(" -> ".join(map(str, SIZES)), len(SIZES) * options.steps, elapsed, checkpoint)]
    alone, taken = trained(recipes[-1], options.folder / "run-alone", 2 * options.steps, None)
    arms.append((f"{SIZES[-1]} alone", 2 * options.steps, taken, alone))
    for name, steps, taken, last in arms:
        assert last is not None
        accuracy = counted(last, recipes[-1], options.prompts)
        page.row(name, f"{steps:,}", f"{taken:,.0f}", f"{accuracy.color:.1%}", f"{accuracy.shape:.1%}")


if __name__ == "__main__":
    main()
