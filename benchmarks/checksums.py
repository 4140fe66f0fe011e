"""Measure what the checksums of checkpoints cost a conversion and a start of training, with and without in turn.

    python -m benchmarks.checksums FOLDER [--blocks 4] [--repeats 5]

The source of the conversion is a checkpoint of this suite, whose files are checked as well. Files are dropped from the
page cache before each time is taken. `without` replaces the CRC-32C by a constant and reads no file to check it.
"""

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks import measure
from benchmarks.saving import make_dataset
from conversion.convert import convert
from conversion.options import Options
from pixart.checkpoint import directory as checkpoints
from pixart.checkpoint import integrity, safetensors_stream
from pixart.checkpoint.directory import Checkpoint
from pixart.checkpoint.normalization import Normalization
from pixart.config.model import ModelConfig
from pixart.config.training import TrainConfig
from pixart.data import manifest as manifests
from pixart.data.loading.loader import Loader
from pixart.data.store.zarr_store import Store
from pixart.model.dit import DiT
from pixart.training.checkpointing import restore, verify
from pixart.training.process_group import process_group
from pixart.training.trainer import Trainer

BARS = {"conversion": 0.10, "start of training": 0.05}  # largest additional times that are allowed
CHANNELS = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    source, converted = options.folder / "source", options.folder / "source.fp8"
    parameters = write_source(source, options.blocks)
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(folder)
        jobs: dict[str, Callable[[], object]] = {
            "conversion": lambda: convert(source, converted, Options(num_batches=1, batch_size=1, overwrite=True)),
            "start of training": lambda: start_training(source, dataset),
        }
        measured = {name: compare(job, [source, converted], options.repeats) for name, job in jobs.items()}
    size = sum(file.stat().st_size for file in source.rglob("*") if file.is_file())
    lines = [
        f"# Cost of the checksums of a checkpoint of {parameters / 1e6:.0f} M parameters and {size / 1e9:.2f} GB, on "
        "two CPU cores",
        "",
        f"The fastest of {options.repeats} runs with and {options.repeats} without, in turn and in one process.",
        "",
        "| job | with, s | without, s | additional | allowed | processor time with, s | without, s | additional |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (with_checksums, without) in measured.items():
        cells = [name]
        for kind in range(2):  # wall time, processor time
            a, b = (min(times[kind] for times in runs) for runs in (with_checksums, without))
            cells += [f"{a:.2f}", f"{b:.2f}", f"{a / b - 1:+.1%}", *([f"{BARS[name]:.0%}"] if kind == 0 else [])]
        lines.append(f"| {' | '.join(cells)} |")
    measure.write("checksums", lines)
    print("\n".join(lines))
    for folder_path in (source, converted):
        shutil.rmtree(folder_path)


def compare(
    job: Callable[[], object], folders: list[Path], repeats: int
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Return the seconds of wall time and of processor time of a job's runs with checksums, and without them."""
    runs: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
    for number in range(1 + repeats):  # the first run of each imports modules and allocates memory
        for index in (0, 1) if number % 2 else (1, 0):
            drop_from_page_cache(folders)
            with without_checksums(enabled=index == 1):
                begun = time.perf_counter(), time.process_time()
                job()
                runs[index].append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    return runs[0][1:], runs[1][1:]


@contextmanager
def without_checksums(*, enabled: bool) -> Iterator[None]:
    """Compute no CRC-32C and read no file to check it while the context is active, if `enabled`."""
    writer: Any = safetensors_stream  # the checksums of the dataset stay
    kept = writer.google_crc32c, integrity.check_files
    if enabled:
        writer.google_crc32c = SimpleNamespace(extend=lambda crc, data: 0)
        integrity.check_files = lambda folder, expected: None
    try:
        yield
    finally:
        writer.google_crc32c, integrity.check_files = kept


def drop_from_page_cache(folders: list[Path]) -> None:
    """Write all data to disk and drop the pages of the folders' files, which are then read from disk."""
    os.sync()
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_source(path: Path, blocks: int) -> int:
    """Write a stage-1 checkpoint of random tensors and return its number of parameters."""
    config = {"dim": 1152, "num_blocks": blocks, "base_image_size": 8, "num_classes": 6, "in_dim": CHANNELS}
    model = DiT(**config)
    state = {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    moments: dict[str, torch.Tensor] = {}
    for name, _ in model.named_parameters():
        moments |= {f"{name}.exp_avg": 1e-3 * state[name], f"{name}.exp_avg_sq": state[name].square()}
        moments[f"{name}.step"] = torch.tensor(8.0)
    normalization = Normalization(mean=(0.0,) * CHANNELS, std=(1.0,) * CHANNELS)
    checkpoints.save(
        Checkpoint(
            stage=1, step=8, config=config, normalization=normalization, model=state, ema=state, optimizer=moments
        ),
        path,
    )
    return sum(parameter.numel() for parameter in model.parameters())


def start_training(checkpoint: Path, dataset: str) -> None:
    """Do what training does from its start until the end of its first step."""
    config = TrainConfig(steps=9, global_batch_size=8, lr=1e-4, warmup_steps=1)
    with process_group() as ranks:
        verify(checkpoint, ranks)
        store = Store(manifests.read(dataset))
        metadata = checkpoints.load_without_tensors(checkpoint)
        trainer = Trainer(metadata, 1, ModelConfig(), config, store, ranks)
        restore(trainer, checkpoint)
        loader = Loader(
            store,
            global_batch_size=config.global_batch_size,
            seed=0,
            cond_dropout_prob=0.1,
            short_caption_prob=0.0,
            text_embeddings=False,
            rank=0,
            world_size=1,
        )
        for batch in loader.iterate(8, 9):
            trainer.train_step(batch)


if __name__ == "__main__":
    main()
