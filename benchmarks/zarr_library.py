"""Benchmark the Zarr library against the suite's own shard files: whole-shard writes and random rows, in one run.

`python -m benchmarks.zarr_library FOLDER` creates 8 shards of 1,024 latents (16x32x32, float16; 268 MB) in FOLDER and
prints a row of a table for the installed version of Zarr. Both read and write the same arrays.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import zarr

from benchmarks import measure
from benchmarks.loader import SHAPE, SHARD, TOKENS, columns
from pixart.config.dataset import DataConfig
from pixart.data import manifest as manifests
from pixart.data.manifest import Manifest
from pixart.data.store import zarr_store as stores
from pixart.data.store.zarr_store import Store

SHARDS, BATCH, REPEATS = 8, 256, 15
COLUMNS = [
    "Zarr",
    "Python",
    "write, Zarr MB/s",
    "write, suite MB/s",
    "ratio",
    "rows, Zarr /s",
    "rows, suite /s",
    "ratio",
]


def median_seconds(first: Callable[[], object], second: Callable[[], object]) -> tuple[float, float]:
    """Return the median wall-clock times in seconds of two functions that are called alternately."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS):
        for function, taken in zip((first, second), times, strict=True):
            begun = time.perf_counter()
            function()
            taken.append(time.perf_counter() - begun)
    return statistics.median(times[0]), statistics.median(times[1])


def make(folder: Path) -> Manifest:
    """Create an empty dataset."""
    images = SHARDS * SHARD
    data = DataConfig(path=str(folder), num_shards=SHARDS, max_images=images, max_text_tokens=TOKENS)
    manifest = Manifest(
        data=data, images=images, rows_per_shard=SHARD, class_names=(), latent_shape=SHAPE, text_dim=2048, models={}
    )
    stores.create(manifest)
    manifests.write(manifest)
    return manifest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    folder = parser.parse_args().folder
    manifest = make(folder)
    array = zarr.open_group(folder / "latents.zarr", mode="a")["latents"]
    assert isinstance(array, zarr.Array)
    latents = np.random.default_rng(0).standard_normal((SHARD, *SHAPE)).astype(np.float16)
    for shard in range(SHARDS):
        stores.write_shard(manifest, shard, columns(manifest, shard, latents))
    column = Store(manifest).columns["latents"]

    def write_by_zarr() -> None:
        array[:SHARD] = latents

    def write_by_suite() -> None:
        stores.write_shard_file(folder, column, 0, latents)

    store, generator = Store(manifest), np.random.default_rng(1)

    def random_rows() -> np.ndarray:
        return generator.integers(0, manifest.images, BATCH)

    written = median_seconds(write_by_zarr, write_by_suite)
    read = median_seconds(
        lambda: array.get_orthogonal_selection((random_rows(),)), lambda: store.read("latents", random_rows())
    )
    megabytes = latents.nbytes / 1e6
    page = measure.Page(
        measure.RESULTS, f"zarr-library-{version('zarr')}", ["# Zarr library and the suite's store"], COLUMNS
    )
    page.row(
        version("zarr"),
        platform.python_version(),
        *(f"{megabytes / seconds:,.0f}" for seconds in written),
        f"{written[0] / written[1]:.1f}",
        *(f"{BATCH / seconds:,.0f}" for seconds in read),
        f"{read[0] / read[1]:.1f}",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
