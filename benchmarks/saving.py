"""Measure how long a checkpoint interrupts training: asynchronous against synchronous saving, in one run.

    python -m benchmarks.saving FOLDER [--blocks 8] [--repeats 5]

The state is that of a stage-1 model of width 1152 in float32: weights, EMA weights and both moments.
"""

import argparse
import dataclasses
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks import measure
from jobs.tasks import caption, init_dataset, latents
from pixart.config.model import ModelConfig
from pixart.config.recipe import to_json
from pixart.config.training import TrainConfig
from pixart.data import manifest as manifests
from pixart.data.store.zarr_store import Store
from pixart.recipes import demo
from pixart.training.checkpointing import CheckpointManager
from pixart.training.process_group import process_group
from pixart.training.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    sizes = ModelConfig(dim=1152, num_blocks=options.blocks, base_latent_size=8, num_classes=5)
    config = TrainConfig(steps=1, global_batch_size=8, lr=1e-4, warmup_steps=1)
    times_by_mode: dict[str, list[float]] = {"asynchronous": [], "synchronous": []}
    with tempfile.TemporaryDirectory() as folder, process_group() as ranks:
        dataset = make_dataset(folder)
        trainer = Trainer(None, 1, sizes, config, Store(manifests.read(dataset)), ranks)
        manager = CheckpointManager(options.folder / "run", ranks, keep_last=1, keep_every=0)
        for _ in range(1 + options.repeats):  # the first save allocates the memory that later ones reuse
            for mode, seconds in times_by_mode.items():
                begun = time.perf_counter()
                manager.save(trainer)
                if mode == "synchronous":
                    manager.wait()
                seconds.append(time.perf_counter() - begun)
                manager.wait()
        manager.close()
    size = sum(tensor.nbytes for tensor in trainer.state_tensors().values())
    share = statistics.median(times_by_mode["asynchronous"][1:]) / statistics.median(times_by_mode["synchronous"][1:])
    lines = [
        f"# Interruption of training by a checkpoint of {size / 1e9:.2f} GB, on two CPU cores",
        "",
        "| saving | seconds, median | fastest to slowest |",
        "|---|---|---|",
        *(
            f"| {mode} | {statistics.median(times[1:]):.3f} | {min(times[1:]):.3f} to {max(times[1:]):.3f} |"
            for mode, times in times_by_mode.items()
        ),
        "",
        f"Asynchronous saving interrupts training for {share:.1%} of the time of synchronous saving.",
    ]
    measure.write("saving", lines)
    print("\n".join(lines))
    shutil.rmtree(options.folder / "run")


def make_dataset(folder: str) -> str:
    """Create a demo dataset of 16 images in `folder` and return its path."""
    recipe = demo(folder)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, max_images=16, num_shards=1))
    init_dataset.run(to_json(recipe))
    caption.run(recipe.data.path, [0])
    latents.run(recipe.data.path, [0])
    return recipe.data.path


if __name__ == "__main__":
    main()
