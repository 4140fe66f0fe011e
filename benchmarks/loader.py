"""Benchmark the data loader against tensorstore, np.memmap, numpy.tofile and MosaicML StreamingDataset, in one run.

`python -m benchmarks.loader FOLDER --peer-python PYTHON` creates 200,000 rows of 16x32x32 float16 latents and caption
tokens in FOLDER (6.6 GB, twice as much with StreamingDataset), prints a table and writes it to `benchmarks/results/`.
PYTHON is an interpreter with the package mosaicml-streaming; without it, StreamingDataset is left out.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import tensorstore

from benchmarks import measure
from pixart.config.dataset import DataConfig
from pixart.data import manifest as manifests
from pixart.data.loading.loader import Loader
from pixart.data.loading.sampler import WINDOW, WindowShuffleSampler
from pixart.data.manifest import Manifest
from pixart.data.store import zarr_store as stores
from pixart.data.store.layout import BLOCK, CRC_BYTES
from pixart.data.store.zarr_store import Store

SHARD, SHAPE, TOKENS, BATCH = 1024, (16, 32, 32), 120, 256
ROW = 2 * int(np.prod(SHAPE))  # bytes of the latents of a row
REPEATS = 9


def columns(manifest: Manifest, shard: int, latents: np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns of a shard, with `latents` (SHARD, C, h, w) changed in place to depend on the shard."""
    rows = np.arange(*manifest.shard_range(shard), dtype=np.int32)
    latents[:, 0, 0, 0] = shard
    return {
        "latents": latents[: len(rows)],
        "label": rows,
        "token_ids": rows[:, None] % 30_000 + np.arange(TOKENS, dtype=np.int32),
        "token_mask": np.arange(TOKENS) <= rows[:, None] % TOKENS,
        "valid": np.ones(len(rows), bool),
    }


def seconds(function: Callable[[], object]) -> float:
    """Return the wall-clock time in seconds of one call."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def make(folder: Path, rows: int) -> tuple[Manifest, list[float], list[float]]:
    """Create a dataset of `rows` rows; return its manifest and two lists of seconds per shard, for the first 40 shards.

    The first list is for `write_shard`, the second for numpy.tofile and fsync of the same bytes, alternating.
    """
    data = DataConfig(path=str(folder), num_shards=-(-rows // SHARD), max_images=rows, max_text_tokens=TOKENS)
    manifest = Manifest(
        data=data, images=rows, rows_per_shard=SHARD, class_names=("any",), latent_shape=SHAPE, text_dim=2048, models={}
    )
    stores.create(manifest)
    manifests.write(manifest)
    latents = np.random.default_rng(0).standard_normal((SHARD, *SHAPE)).astype(np.float16)
    ours: list[float] = []
    plain: list[float] = []
    for shard in range(data.num_shards):
        values = columns(manifest, shard, latents)
        ours.append(seconds(lambda: stores.write_shard(manifest, shard, values)))  # noqa: B023
        if len(plain) < 40:
            plain.append(seconds(lambda: write_with_numpy(folder / f"plain-{shard}", values)))  # noqa: B023
    for file in folder.glob("plain-*"):
        file.unlink()
    return manifest, ours[: len(plain)], plain


def write_with_numpy(target: Path, values: dict[str, np.ndarray]) -> None:
    """Write arrays to one file with numpy.tofile and flush it to disk."""
    with target.open("wb") as file:
        for array in values.values():
            array.tofile(file)
        file.flush()
        os.fsync(file.fileno())


def tensorstore_reader(manifest: Manifest, context: dict) -> Callable[[np.ndarray], object]:
    """Return a function that reads rows of all arrays but `valid` concurrently with tensorstore.

    `context` is tensorstore's context, for example with a cache pool.
    """
    root = f"{manifest.data.path}/latents.zarr"
    arrays = [
        tensorstore.open(
            {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": f"{root}/{name}/"},
                "context": context,
                "recheck_cached_data": "open",
            }
        ).result()
        for name in stores.layout(manifest)
        if name != "valid"
    ]

    def read(rows: np.ndarray) -> object:
        return [future.result() for future in [array[rows].read() for array in arrays]]

    return read


def random_rates(manifest: Manifest) -> dict[str, float]:
    """Return the median rows/s of batches of uniformly random rows, by reader; the readers alternate."""
    store = Store(manifest)
    names = [name for name in store.arrays if name != "valid"]
    readers: dict[str, Callable[[np.ndarray], object]] = {
        "ours": lambda rows: [store.read(name, rows) for name in names],
        "tensorstore": tensorstore_reader(manifest, {}),
        "tensorstore, 256 MB of cache": tensorstore_reader(
            manifest, {"cache_pool": {"total_bytes_limit": 256_000_000}}
        ),
    }
    random, taken = np.random.default_rng(1), {reader: [] for reader in readers}
    for _ in range(100):
        rows = random.integers(0, manifest.images, BATCH)
        for reader, read in readers.items():
            taken[reader].append(seconds(lambda: read(rows)))  # noqa: B023
    return {reader: BATCH / statistics.median(seconds_taken) for reader, seconds_taken in taken.items()}


def memmap_pass(manifest: Manifest, store: Store, rows: int) -> float:
    """Return the MB/s at which np.memmap copies all latents in order, `rows` rows at a time; copies are discarded."""
    begun, copied = time.perf_counter(), 0
    for shard in range(manifest.data.num_shards):
        file = Path(manifest.data.path) / store.columns["latents"].file(shard)
        chunks = np.memmap(file, np.uint8, "r", shape=(SHARD, ROW + CRC_BYTES))[:, :ROW]
        for start in range(0, SHARD, rows):
            copied += np.array(chunks[start : start + rows]).nbytes
    return copied / (time.perf_counter() - begun) / 1e6


def epoch(loader: Loader, number: int) -> float:
    """Return the rows/s of a loader's rank over the epoch `number`."""
    steps = len(loader.order.samplers[0].valid) // loader.global_batch_size
    begun, rows = time.perf_counter(), 0
    for batch in loader.iterate(number * steps, (number + 1) * steps):
        rows += len(batch.rows)
    return rows / (time.perf_counter() - begun)


def memory(path: str, at: list[int]) -> list[str]:
    """Return texts with the resident memory in MB after each number of batches in `at`, ascending.

    Call it in a new process, because it measures the memory of its process.
    """
    texts = []
    loader = Loader(Store(manifests.read(path)), global_batch_size=BATCH, seed=0)
    for step, _ in enumerate(loader.iterate(0, at[-1]), 1):
        if step in at:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            texts.append(f"{pages * os.sysconf('SC_PAGE_SIZE') / 1e6:,.0f} MB after {step:,} batches")
    return texts


def first_batch(path: str, share: float) -> float:
    """Return the median seconds to open a dataset and load the batch at `share` of the first epoch."""

    def run() -> object:
        loader = Loader(Store(manifests.read(path)), global_batch_size=BATCH, seed=0)
        start = int(share * len(loader.order.samplers[0].valid) / BATCH)
        return next(loader.iterate(start, start + 1))

    return statistics.median(seconds(run) for _ in range(REPEATS))


def first_rows(rows: int, share: float) -> float:
    """Return the median seconds to create a sampler of `rows` rows and draw a batch at `share` of the first epoch."""

    def run() -> object:
        order = WindowShuffleSampler(np.arange(rows), rows_per_shard=SHARD, seed=0)
        start = 2048 * int(share * rows / 2048)
        return order.rows(start, start + 2048)

    return statistics.median(seconds(run) for _ in range(REPEATS))


def quality(rows: int) -> str:
    """Describe the shuffle of one epoch: its rank correlation, and the rows of one block in a batch."""
    drawn = WindowShuffleSampler(np.arange(rows), rows_per_shard=SHARD, seed=0).rows(0, rows)
    correlation = abs(np.corrcoef(np.arange(rows), drawn)[0, 1])
    batches = drawn[: rows // BATCH * BATCH].reshape(-1, BATCH)
    most = [np.unique(batch // BLOCK, return_counts=True)[1].max() for batch in batches]
    return (
        f"rank correlation {correlation:.4f}; of a batch of {BATCH}, at most {max(most)} rows of one block, "
        f"{np.mean(most):.1f} on average"
    )


PEER = f"""
import json, shutil, sys, time
from pathlib import Path
import numpy as np
from streaming import MDSWriter, StreamingDataset
source, target, rows, repeats = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
kinds = {{"latents": "ndarray:float16:16,32,32", "label": "int32", "token_ids": "ndarray:int32:{TOKENS}",
         "token_mask": "ndarray:uint8:{TOKENS}"}}
with MDSWriter(out=target, columns=kinds, size_limit=1 << 26) as writer:
    for row in range(rows):
        if row % {SHARD} == 0:
            chunks = np.memmap(source / f"{{row // {SHARD}}}/0/0/0", np.uint8, "r", shape=({SHARD}, {ROW + CRC_BYTES}))
        latents = np.array(chunks[row % {SHARD}, :{ROW}]).view(np.float16).reshape({SHAPE})
        ids = (row % 30_000 + np.arange({TOKENS})).astype(np.int32)
        mask = (np.arange({TOKENS}) <= row % {TOKENS}).astype(np.uint8)
        writer.write({{"latents": latents, "label": row, "token_ids": ids, "token_mask": mask}})
dataset = StreamingDataset(local=target, shuffle=True, batch_size={BATCH})
rates = []
for _ in range(repeats):
    begun = time.perf_counter()
    seen = sum(1 for _ in dataset)
    rates.append(seen / (time.perf_counter() - begun))
print("RATES " + json.dumps(rates))
"""


def peer(python: str | None, manifest: Manifest, folder: Path) -> list[float]:
    """Return the rows/s of StreamingDataset in each of three epochs over the same rows; empty if `python` is None.

    `folder` holds its copy of the data, which is deleted. Raises RuntimeError if the subprocess fails.
    """
    if python is None:
        return []
    words = [python, "-c", PEER, f"{manifest.data.path}/latents.zarr/latents/c", str(folder), str(manifest.images), "3"]
    done = subprocess.run(words, capture_output=True, text=True)
    shutil.rmtree(folder, ignore_errors=True)
    if done.returncode:
        raise RuntimeError(f"the peer failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.split("RATES ")[-1])


def lines(folder: Path, rows: int, python: str | None) -> Iterator[str]:
    """Run all measurements and yield the lines of the Markdown table."""
    manifest, ours, plain = make(folder / "dataset", rows)
    path, mb = manifest.data.path, 1e-6 * ROW
    peers = peer(python, manifest, folder / "peer")
    store = Store(manifest)
    loader = Loader(store, global_batch_size=BATCH, seed=0)
    eighth = Loader(store, global_batch_size=8 * BATCH, seed=0, rank=3, world_size=8)
    memmap_pass(manifest, store, SHARD), epoch(loader, 0), epoch(eighth, 0)
    sequential: dict[int, list[float]] = {SHARD: [], BATCH: []}
    shuffled, shared = [], []
    for number in range(1, REPEATS + 1):
        for count, passes in sequential.items():
            passes.append(memmap_pass(manifest, store, count))
        shuffled.append(epoch(loader, number))
        shared.append(epoch(eighth, number))
    rates, reached = random_rates(manifest), statistics.median(shuffled)
    best = max(rate for reader, rate in rates.items() if reader != "ours")

    yield "| measurement | result | target |"
    yield "|---|---|---|"
    details = ", ".join(f"{reader} {rate / 1e3:.1f} k" for reader, rate in rates.items())
    share_of_best = f"{rates['ours'] / best:.2f} of tensorstore"
    yield f"| random batches of {BATCH}, all columns, rows/s: {details} | {share_of_best} | 0.9 |"
    if peers:
        peer_rate = statistics.median(peers)
        yield (
            f"| shuffled epochs, all columns, rows/s: {reached / 1e3:.1f} k, StreamingDataset {peer_rate / 1e3:.1f} k "
            f"| {reached / peer_rate:.1f} times | 4 |"
        )
    else:
        yield "| shuffled epochs against StreamingDataset | not measured: no --peer-python | 4 |"
    for count, pass_name in (
        (SHARD, "a shard at a time"),
        (BATCH, "256 rows at a time into the same cached memory"),
    ):
        sequential_rate = statistics.median(sequential[count])
        details = ", ".join(
            f"{rate * mb / sequential_mb:.2f}" for rate, sequential_mb in zip(shuffled, sequential[count], strict=True)
        )
        yield (
            f"| shuffled epochs, latents: {reached * mb:,.0f} MB/s; np.memmap in order, {pass_name}: "
            f"{sequential_rate:,.0f} MB/s | {reached * mb / sequential_rate:.2f} (per repetition {details}) | 0.5 |"
        )
    yield f"| one of 8 ranks, rows of all blocks | {statistics.median(shared) * mb:,.0f} MB/s | |"
    for share in (0.0, 0.9):
        yield f"| opening the store and first batch at {share:.0%} of an epoch | {first_batch(path, share):.2f} s | 1 |"
        yield f"| first rows at {share:.0%} of 14 million | {first_rows(14_000_000, share):.2f} s | 1 |"
    last = max(5500, 7 * rows // BATCH)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        memory_texts = process.submit(memory, path, [1000, 5000, last]).result()
    yield f"| resident memory of a process | {', '.join(memory_texts)} | flat |"
    ratio = statistics.median(plain) / statistics.median(ours)
    yield (
        f"| a shard of {SHARD} rows written: {statistics.median(ours) * 1e3:.0f} ms; numpy.tofile and fsync of "
        f"the same bytes: {statistics.median(plain) * 1e3:.0f} ms | {ratio:.2f} | 0.7 |"
    )
    yield f"| shuffle of {rows:,} rows in blocks of {BLOCK}, windows of {WINDOW:,} | {quality(rows)} | 0.02 |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument(
        "--peer-python",
        help="Interpreter with the package mosaicml-streaming (default: StreamingDataset is not measured).",
    )
    parser.add_argument("--keep", action="store_true", help="Keep the dataset (default: delete it).")
    options = parser.parse_args()
    try:
        table = list(lines(options.folder, options.rows, options.peer_python))
    finally:
        if not options.keep:
            shutil.rmtree(options.folder / "dataset", ignore_errors=True)
    load = os.getloadavg()[2]
    title = f"# Data loader, {options.rows:,} rows, warm page cache, one process, {os.cpu_count()} CPU cores"
    note = (
        f"Python {platform.python_version()}, tensorstore {version('tensorstore')}, load average over the "
        f"last 15 minutes {load:.1f}. Medians of {REPEATS} alternating repetitions."
    )
    measure.write("loader", [title, "", *table, "", note])
    print("\n".join(table))


if __name__ == "__main__":
    main()
