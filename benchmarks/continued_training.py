"""Compare training after a conversion in BF16, in FP8 with and without calibrated scales, and in FP8 from scratch.

`python -m benchmarks.continued_training HOME` uses the demo's dataset and stage-1 checkpoint in HOME, which `make demo`
creates, and writes a table and a plot of the validation loss to `benchmarks/results/`. FP8 is emulated without a GPU.
"""

import argparse
import dataclasses
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from benchmarks import measure
from conversion.batches import dataset_batches
from conversion.calibration.amax import mean_loss
from conversion.convert import convert
from conversion.options import Options
from jobs.tasks import caption, init_dataset, latents
from pixart.checkpoint import directory as checkpoints
from pixart.checkpoint.directory import Checkpoint
from pixart.config.recipe import to_json
from pixart.model.dit import DiT, load_model
from pixart.model.fp8.scaling import calibrated_state
from pixart.recipes import demo
from pixart.training.loop import train
from pixart.training.optimizer import MOMENTS

EVERY, BATCH, SEEDS = 50, 32, 3
VALIDATION_IMAGES = 512
ARMS = {
    "BF16 continued": "tab:blue",
    "FP8, calibrated scales": "tab:orange",
    "FP8, uncalibrated scales": "tab:green",
    "FP8 from scratch": "tab:red",
}


def validation_dataset(home: Path) -> str:
    """Return the path of a validation dataset, created at the first call, with scenes that training does not use."""
    recipe = demo(str(home))
    data = dataclasses.replace(
        recipe.data, path=str(home / "datasets/validation"), seed=1, max_images=VALIDATION_IMAGES, num_shards=8
    )
    if not Path(data.path).exists():
        init_dataset.run(to_json(dataclasses.replace(recipe, data=data)))
        caption.run(data.path, list(range(8)))
        latents.run(data.path, list(range(8)))
    return data.path


def with_uncalibrated_scales(start: Checkpoint) -> Checkpoint:
    """Return the checkpoint with uncalibrated FP8 scales: every scale is 1 and every amax history is zero."""
    assert start.plan is not None
    nothing = {name: torch.zeros(3) for name in start.plan.linears}
    return dataclasses.replace(start, scales=calibrated_state(nothing, start.plan))


def with_new_weights(start: Checkpoint, seed: int) -> Checkpoint:
    """Return the checkpoint with newly initialized weights, zero moments and uncalibrated scales."""
    torch.manual_seed(seed)
    model = DiT(**start.config)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = {
        f"{name}.{field}": torch.zeros(parameter.shape if field in MOMENTS else ())
        for name, parameter in model.named_parameters()
        for field in (*MOMENTS, "step")
    }
    return dataclasses.replace(with_uncalibrated_scales(start), model=state, ema=state, optimizer=moments)


def curve(
    folder: Path, arm: str, seed: int, options: argparse.Namespace, start: Checkpoint, evaluation: str
) -> list[float]:
    """Train stage 2 from `start` and return the validation loss at step 0 and after every EVERY steps.

    `arm` is a key of ARMS and decides between BF16 and FP8; `evaluation` is the path of the validation dataset.
    """
    recipe = demo(str(options.home))
    begin = checkpoints.save(start, folder / "start")
    config = dataclasses.replace(
        recipe.stage2,
        steps=options.steps,
        global_batch_size=BATCH,
        lr=options.lr,
        seed=seed,
        save_every=EVERY,
        keep_last=options.steps // EVERY,
        precision="bf16",
        fp8=arm.startswith("FP8"),
    )
    train(stage=2, model=recipe.model, config=config, dataset=recipe.data.path, run=folder, start=begin)
    batches = dataset_batches(evaluation, start, VALIDATION_IMAGES // 64, 64)
    losses = []
    for directory in [begin, *checkpoints.list_checkpoints(folder)]:
        saved = checkpoints.load(directory)
        model = load_model(saved.config, saved.model, measure.device())
        losses.append(mean_loss(model, batches))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("home", type=Path)
    parser.add_argument(
        "--lr", type=float, default=demo("").stage2.lr, help="Learning rate (default: that of the demo)."
    )
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    options.home = home = options.home.absolute()
    stage1 = next(
        directory
        for run in sorted(home.glob("runs/*-train-*"))
        for directory in checkpoints.list_checkpoints(run)[-1:]
        if checkpoints.read_metadata(directory)["stage"] == 1
    )
    work, evaluation = home / f"continued-training-{options.lr:g}", validation_dataset(home)
    convert(stage1, work / "start.fp8", Options(batch_size=BATCH, overwrite=True))
    start = checkpoints.load(work / "start.fp8")
    losses_by_arm: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    for seed in range(SEEDS):
        begin = [
            dataclasses.replace(start, plan=None, scales={}),
            start,
            with_uncalibrated_scales(start),
            with_new_weights(start, seed),
        ]
        for arm, checkpoint in zip(ARMS, begin, strict=True):
            folder = work / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
            losses_by_arm[arm].append(curve(folder, arm, seed, options, checkpoint, evaluation))
            print(f"{arm}, seed {seed}: {' '.join(f'{loss:.4f}' for loss in losses_by_arm[arm][-1])}", flush=True)
    write(losses_by_arm, options.lr)


def write(losses_by_arm: dict[str, list[list[float]]], lr: float) -> None:
    """Write the table and the plot of the validation losses, which `losses_by_arm` has by arm, seed and evaluation."""
    steps = [EVERY * number for number in range(len(losses_by_arm["BF16 continued"][0]))]
    name = f"continued-training-lr-{lr:g}"
    finals = {arm: np.array(curves)[:, -1] for arm, curves in losses_by_arm.items()}
    base = finals["BF16 continued"]
    columns = " | ".join(f"step {step}" for step in steps)
    lines = [f"| validation loss, mean of {SEEDS} seeds | {columns} | last against BF16, by seed |"]
    lines.append("|---" * (len(steps) + 2) + "|")
    figure, axes = plt.subplots(figsize=(8, 4.5), dpi=120)
    for arm, curves in losses_by_arm.items():
        mean = np.mean(curves, axis=0)
        gaps = ", ".join(f"{gap:+.2%}" for gap in finals[arm] / base - 1)
        lines.append(f"| {arm} | {' | '.join(f'{loss:.4f}' for loss in mean)} | {gaps} |")
        axes.fill_between(
            steps, np.min(curves, axis=0), np.max(curves, axis=0), color=ARMS[arm], alpha=0.2, linewidth=0
        )
        axes.plot(steps, mean, label=arm, color=ARMS[arm])
    axes.set(
        xlabel="steps after the conversion",
        ylabel="validation loss",
        title=f"The demo's stage 2, batch {BATCH}, learning rate {lr:g}",
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(measure.RESULTS / f"{name}.png", bbox_inches="tight")
    device = f"on {measure.device_name()}" + ("" if torch.cuda.is_available() else ", FP8 emulated")
    title = f"# Training after the conversion, learning rate {lr:g}, {device}"
    measure.write(name, [title, "", *lines, "", f"![Validation loss by steps]({name}.png)"])
    print("\n".join(lines))


if __name__ == "__main__":
    main()
