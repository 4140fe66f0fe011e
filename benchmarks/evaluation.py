"""Distances against torch-fidelity at full size, and the speed of sampling in an evaluation.

    python -m benchmarks.evaluation distances --images FOLDER --python PYTHON
    python -m benchmarks.evaluation speed --run RUN

FOLDER holds photos, of which 4,096 mutated copies are made twice; PYTHON is an interpreter with torch and torchvision
that fit each other, for torch-fidelity in `.venv-fidelity`. RUN is a training run of stage 2.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from pixart.evaluation import features, reference
from pixart.evaluation.distances import Kernels, frechet, sliced_wasserstein
from pixart.evaluation.statistics import FeatureStatistics, merge_files, save
from tests.support.evaluation import blurred, mutated, noisy, scenes
from tests.support.fidelity import fidelity

COUNT, SHARE, SHARDS = 4096, (0.12, 0.2), (1, 8, 64)
EXTRACTORS = ("efficientnet-lite0:112", "efficientnet-lite0")
STEPS, GUIDANCE = 20, 2.0
LARGE_LATENT = 32  # side in latent pixels, 256 pixels of an image


def extract(extractor: features.Extractor, images: list[Image.Image]) -> np.ndarray:
    return np.concatenate(list(extractor.stream(images)))


def statistics_of(values: np.ndarray) -> FeatureStatistics:
    return FeatureStatistics.empty(values.shape[1], COUNT).add(np.arange(len(values)), values)


def in_shards(values: np.ndarray, shards: int, folder: Path) -> FeatureStatistics:
    """Return the statistics of features that were written by shards and merged."""
    paths = [folder / f"{shards}-{index}.npz" for index in range(shards)]
    for path, rows in zip(paths, np.array_split(np.arange(len(values)), shards), strict=True):
        save(FeatureStatistics.empty(values.shape[1], COUNT).add(rows, values[rows]), path)
    return merge_files(paths)


def compare_distances(folder: Path, python: Path) -> None:
    photos = [Image.open(path).convert("RGB") for path in reference.list_images(folder)]
    sets = {
        f"{COUNT} mutated copies of {len(photos)} photos": [mutated(photos, COUNT, seed, SHARE) for seed in (1, 2)],
        f"{COUNT} demo scenes": [scenes(COUNT, seed) for seed in (1, 2)],
    }
    for title, (same, target) in sets.items():
        variants = {"same distribution": same, "blur 1 px": [blurred(image) for image in same]}
        variants["noise 12"] = [noisy(0)(image) for image in same]
        for name in EXTRACTORS if "photos" in title else EXTRACTORS[:1]:
            extractor = features.load(name, 64)
            expected = extract(extractor, target)
            print(f"\n## {title}, {name}, {extractor.resize}\n")
            print("| images | FD | torch-fidelity | KID | torch-fidelity | sliced Wasserstein | FD over shards |")
            print("|---|---|---|---|---|---|---|")
            for label, images in variants.items():
                print(row(label, extract(extractor, images), expected, python), flush=True)


def row(label: str, generated: np.ndarray, expected: np.ndarray, python: Path) -> str:
    with tempfile.TemporaryDirectory() as name:
        np.savez(Path(name) / "features.npz", generated=generated, reference=expected)
        theirs = fidelity(python, Path(name) / "features.npz")
        target = statistics_of(expected)
        merged = [frechet(in_shards(generated, shards, Path(name)), target) for shards in SHARDS]
    spread = (max(merged) - min(merged)) / merged[0]
    values = [merged[0], theirs["frechet_inception_distance"], Kernels.compute(generated, expected).kid()]
    values += [theirs["kernel_inception_distance_mean"], sliced_wasserstein(generated, expected)]
    cells = " | ".join(f"{value:.7g}" for value in values)
    return f"| {label} | {cells} | {spread:.0e} relative spread over {', '.join(map(str, SHARDS))} |"


def enlarge(pipeline, width: int) -> None:
    """Replace the transformer by a larger one with random weights, which samples 256 pixels."""
    from pixart.model.dit import DiT

    torch.manual_seed(0)
    config = dict(pipeline.transformer.config)
    names = ("in_dim", "cond_dim", "mlp_ratio", "patch_size", "text_dim")
    sizes = {"dim": width, "num_heads": width // 64, "num_blocks": 12, "base_image_size": LARGE_LATENT}
    model = DiT(**{name: config[name] for name in names}, **sizes).eval()
    pipeline.register_modules(transformer=model)
    pipeline.register_to_config(sample_size=LARGE_LATENT)


def measure_speed(run: Path, width: int, num_images: int, repeats: int, steps: int) -> None:
    from pixart.checkpoint.directory import read_metadata
    from pixart.data import manifest as manifests
    from pixart.demo.scenes import caption, make_scene
    from pixart.sampling.denoise import denoise
    from pixart.sampling.images import BATCH_SIZE, SampleRequest, generate
    from pixart.sampling.loading import find, load_pipeline
    from pixart.sampling.png import save_png

    directory = find(run)
    pipeline = load_pipeline(directory, "ema", manifests.read(read_metadata(directory)["dataset"]))
    if width:
        enlarge(pipeline, width)
    pictures = [SampleRequest(seed=index, prompt=caption(make_scene(9, index))) for index in range(num_images)]
    channels = pipeline.transformer.config.in_dim
    conditioning, null = pipeline.text_conditioning([picture.prompt for picture in pictures[:BATCH_SIZE]])
    noise = torch.randn(BATCH_SIZE, channels, *pipeline.default_latent_size)

    def alone() -> None:
        for _ in range(num_images // BATCH_SIZE):
            denoise(pipeline.transformer, conditioning, null, noise, steps=steps, guidance=GUIDANCE)

    def written() -> None:
        with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(1) as writer:
            for index, image in enumerate(generate(pipeline, pictures, steps=steps, guidance=GUIDANCE)):
                writer.submit(save_png, image, Path(name) / f"{index}.png", pictures[index].settings())

    seconds: dict[str, list[float]] = {"denoising alone": [], "sampling with images written": []}
    measured: list[tuple[str, Callable[[], None]]] = list(zip(seconds, (alone, written), strict=True))
    for _, function in measured:
        function()
    for _ in range(repeats):
        for name, function in measured:
            begun = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - begun)
    print("| | images/s, median |\n|---|---|")
    rates = {name: num_images / float(np.median(values)) for name, values in seconds.items()}
    for name, rate in rates.items():
        print(f"| {name} | {rate:.1f} |")
    pairs = zip(*seconds.values(), strict=True)
    print(f"\nratio of the paired times, median: {np.median([first / second for first, second in pairs]):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("distances", "speed"))
    parser.add_argument("--images", type=Path)
    parser.add_argument("--python", type=Path)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--width", type=int, default=0, help="width of a larger model with random weights")
    parser.add_argument("--num-images", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    if arguments.what == "distances":
        compare_distances(arguments.images, arguments.python)
    else:
        measure_speed(arguments.run, arguments.width, arguments.num_images, arguments.repeats, arguments.steps)


if __name__ == "__main__":
    main()
