"""Benchmark the data loader on rows in six aspect buckets against rows of one shape with equal bytes, in one run.

`python -m benchmarks.bucketed_loader FOLDER` creates two datasets of 65,536 rows of 32 KiB of latents in FOLDER (4.6 GB
in all), measures their shuffled epochs in alternation, and writes a table to `benchmarks/results/`.
"""

import argparse
import os
import platform
import shutil
import statistics
from pathlib import Path

import numpy as np

from benchmarks import measure
from benchmarks.loader import BATCH, SHAPE, SHARD, TOKENS, seconds
from pixart.config.dataset import DataConfig
from pixart.data import manifest as manifests
from pixart.data.loading.loader import Loader
from pixart.data.manifest import Manifest
from pixart.data.store import zarr_store as stores
from pixart.data.store.layout import BUCKET, VALID, latents_of
from pixart.data.store.zarr_store import Store

BUCKETS = ((4, 256), (8, 128), (16, 64), (32, 32), (64, 16), (128, 8))  # heights and widths, of equal areas
SHARES = (0.04, 0.1, 0.25, 0.4, 0.15, 0.06)  # of the rows
FACTOR = 8  # pixels of a latent pixel
TARGET, REPEATS = 0.8, 15


def make(folder: Path, rows: int, *, bucketed: bool) -> Store:
    """Create a dataset of `rows` rows of random latents, whose rows are in BUCKETS or of one shape."""
    shapes = ",".join(f"{FACTOR * width}x{FACTOR * height}" for height, width in BUCKETS)
    data = DataConfig(
        path=str(folder),
        num_shards=-(-rows // SHARD),
        max_images=rows,
        max_text_tokens=TOKENS,
        aspect_buckets=shapes if bucketed else None,
    )
    manifest = Manifest(
        data=data,
        images=rows,
        rows_per_shard=SHARD,
        class_names=("any",),
        latent_shape=SHAPE,
        buckets=BUCKETS if bucketed else (),
        text_dim=2048,
        models={},
    )
    stores.create(manifest)
    manifests.write(manifest)
    random = np.random.default_rng(0)
    latents = random.standard_normal((SHARD, *SHAPE)).astype(np.float16)
    for shard in range(data.num_shards):
        stores.write_shard(manifest, shard, columns(manifest, shard, latents, random))
    return Store(manifest)


def columns(manifest: Manifest, shard: int, latents: np.ndarray, random: np.random.Generator) -> dict[str, np.ndarray]:
    """Return the columns of a shard, whose rows take their values from `latents` (SHARD, C, h, w)."""
    rows = np.arange(*manifest.shard_range(shard), dtype=np.int32)
    bucket = random.choice(len(BUCKETS), len(rows), p=SHARES).astype(np.int16)
    values = {
        name: latents[: len(rows)][bucket == index if manifest.buckets else slice(None)].reshape(-1, *shape)
        for index, (name, shape) in enumerate(latents_of(manifest).items())
    }
    return {
        **values,
        **({BUCKET: bucket} if manifest.buckets else {}),
        "label": rows,
        "token_ids": rows[:, None] % 30_000 + np.arange(TOKENS, dtype=np.int32),
        "token_mask": np.arange(TOKENS) <= rows[:, None] % TOKENS,
        VALID: np.ones(len(rows), bool),
    }


def epoch(loader: Loader, number: int) -> float:
    """Return the rows/s of a loader over as many steps as an epoch without carried rows has."""
    steps = int(loader.order.sizes.sum()) // loader.global_batch_size
    taken = seconds(lambda: [len(batch.rows) for batch in loader.iterate(number * steps, (number + 1) * steps)])
    return steps * (loader.local.stop - loader.local.start) / taken


def compare(loaders: list[Loader]) -> list[list[float]]:
    """Return the rows/s of REPEATS epochs of each loader; they alternate, after one epoch that is not counted."""
    rates: list[list[float]] = [[] for _ in loaders]
    for number in range(REPEATS + 1):
        for loader, measured in zip(loaders, rates, strict=True):
            measured.append(epoch(loader, number))
    return [measured[1:] for measured in rates]


def lines(folder: Path, rows: int) -> list[str]:
    """Run all measurements and return the lines of the Markdown table."""
    both = [make(folder / name, rows, bucketed=name == "buckets") for name in ("one-shape", "buckets")]
    table = ["| shuffled epochs, all columns | one shape, rows/s | six buckets, rows/s | ratio | target |"]
    table.append("|---|---|---|---|---|")
    for ranks in (1, 8):
        loaders = [
            Loader(store, global_batch_size=ranks * BATCH, seed=0, rank=ranks // 2, world_size=ranks) for store in both
        ]
        plain, bucketed = compare(loaders)
        ratios = [two / one for one, two in zip(plain, bucketed, strict=True)]
        table.append(
            f"| one of {ranks} ranks, {BATCH} rows each | {statistics.median(plain):,.0f} | "
            f"{statistics.median(bucketed):,.0f} | {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}) | {TARGET} |"
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=65_536)
    options = parser.parse_args()
    try:
        table = lines(options.folder, options.rows)
    finally:
        for name in ("one-shape", "buckets"):
            shutil.rmtree(options.folder / name, ignore_errors=True)
    shares = ", ".join(f"{width}x{height} {share:.0%}" for (height, width), share in zip(BUCKETS, SHARES, strict=True))
    title = (
        f"# Loader with aspect buckets, {options.rows:,} rows of 32 KiB, warm page cache, {os.cpu_count()} CPU cores"
    )
    note = (
        f"Latents of {shares}. Python {platform.python_version()}, load average over the last 15 minutes "
        f"{os.getloadavg()[2]:.1f}. Medians of {REPEATS} alternating epochs; the ratio is that of epochs that follow "
        "each other, with its range."
    )
    measure.write("loader-buckets", [title, "", *table, "", note])
    print("\n".join(table))


if __name__ == "__main__":
    main()
