"""Compare stage-2 training in BF16 and FP8 after a conversion at full size, and sampling from the converted checkpoint.

    python -m benchmarks.gpu_training DATASET [--steps 500] [--stage1-steps 300] [--batch 64] [--tiny]

Stage 1 is trained on the dataset's classes and converted once. Stage 2 is then trained from this checkpoint in BF16 and
in FP8, with the same rows, noise and times. Finally, images are sampled from the same noise in float32, in BF16 and
with FP8 weights. Tables are written row by row, and the images as a contact sheet.
"""

import argparse
import contextlib
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks import measure
from conversion.convert import convert
from conversion.options import Options
from pixart.config.model import ModelConfig
from pixart.config.training import TrainConfig
from pixart.data import manifest as manifests
from pixart.data.store.zarr_store import Store
from pixart.sampling import loading
from pixart.sampling.contact_sheet import contact_sheet
from pixart.sampling.images import SampleRequest, generate
from pixart.sampling.pipeline import PixArtPipeline
from pixart.training.loop import train

PARTS = 10  # intervals of steps whose mean losses are listed
SAMPLING_STEPS, GUIDANCE = 20, 3.0
TINY = {"dim": 64, "cond_dim": 32, "num_heads": 4, "num_blocks": 2}


class Losses:
    """Reporter that records the training and validation losses by step, and the seconds per step."""

    def __init__(self) -> None:
        self.train: dict[int, float] = {}
        self.validation: dict[int, float] = {}
        self.seconds: list[float] = []

    def metrics(self, step: int, values: dict[str, float]) -> None:
        if "train/loss" in values:
            self.train[step] = values["train/loss"]
        if "val/loss" in values:
            self.validation[step] = values["val/loss"]
        if "train/seconds_per_step" in values:
            self.seconds.append(values["train/seconds_per_step"])

    def incident(self, step: int, text: str) -> None:
        print(f"step {step}: {text}", flush=True)

    def artifact(self, file: Path) -> None:
        pass


def configuration(options: argparse.Namespace, steps: int, *, fp8: bool) -> TrainConfig:
    """Return the training configuration of either stage; only the last step saves and validates."""
    return TrainConfig(
        steps=steps,
        global_batch_size=options.batch,
        lr=1e-4,
        warmup_steps=min(100, steps // 2),
        ema_decay=0.99,
        fp8=fp8,
        compile=not options.tiny,
        log_every=min(10, steps),
        save_every=steps,
        keep_last=1,
        validate_every=steps,
        num_validation_samples=min(options.batch, options.rows // 10),
    )


def trained(options: argparse.Namespace, work: Path, stage: int, steps: int, start: Path | None, *, fp8: bool):
    """Train a stage and return the directory of the last checkpoint and the recorded losses.

    Training starts from the checkpoint `start`, or from new weights if it is None.
    """
    losses = Losses()
    name = f"stage{stage}-{'fp8' if fp8 else 'bf16'}"
    config = configuration(options, steps, fp8=fp8)
    model = (
        ModelConfig(**TINY, num_classes=options.classes) if options.tiny else ModelConfig(num_classes=options.classes)
    )
    last = train(
        stage=stage,
        model=model,
        config=config,
        dataset=str(options.dataset),
        run=work / name,
        start=start,
        reporter=losses,
    )
    return last, losses


def compare(page: measure.Page, bf16: Losses, fp8: Losses) -> None:
    """Add rows with the mean training loss of each interval, the validation losses and the median time per step."""
    steps = sorted(bf16.train)
    for part in np.array_split(np.array(steps), min(PARTS, len(steps))):
        one, other = (statistics.fmean(losses.train[int(step)] for step in part) for losses in (bf16, fp8))
        page.row(f"steps {part[0]} to {part[-1]}", f"{one:.5f}", f"{other:.5f}", f"{other / one - 1:+.3%}")
    for step in sorted(bf16.validation.keys() & fp8.validation.keys()):
        one, other = bf16.validation[step], fp8.validation[step]
        page.row(f"validation, step {step}", f"{one:.5f}", f"{other:.5f}", f"{other / one - 1:+.3%}")
    one, other = (1e3 * statistics.median(losses.seconds) for losses in (bf16, fp8))
    page.row("ms/step, median", f"{one:.1f}", f"{other:.1f}", f"{one / other:.2f}x")


def pictures(pipeline: PixArtPipeline, prompts: Sequence[str], precision: torch.dtype | None):
    """Sample one image per prompt under autocast to `precision`; return the images and the total seconds.

    With `precision` None, autocast is disabled.
    """
    requests = [SampleRequest(seed=index, prompt=prompt) for index, prompt in enumerate(prompts)]
    device = measure.device()
    pipeline.to(device)
    cast = torch.autocast(device.type, precision) if precision else contextlib.nullcontext()
    begun = time.perf_counter()
    with cast:
        images = list(generate(pipeline, requests, steps=SAMPLING_STEPS, guidance=GUIDANCE))
    return images, time.perf_counter() - begun


def psnr(one: Sequence[Image.Image], other: Sequence[Image.Image]) -> float:
    """Return the peak signal-to-noise ratio in dB, with the squared error averaged over all images."""
    errors = [np.square(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in zip(one, other, strict=True)]
    return float(10 * np.log10(255**2 / max(np.mean(errors), 1e-9)))


def sample(options: argparse.Namespace, checkpoint: Path) -> None:
    """Sample from a converted checkpoint in each precision, and write a table and a contact sheet."""
    dataset = manifests.read(options.dataset)
    heading = [
        f"# {options.pictures} sampled images, {SAMPLING_STEPS} steps, guidance {GUIDANCE}, on {measure.device_name()}",
        "",
        "From one converted checkpoint and the same noise; the first, warm-up run of each variant is not counted.",
    ]
    page = measure.Page(options.out, "gpu-sampling", heading, ["weights", "pictures/s", "PSNR to float32, dB"])
    prompts = [dataset.class_names[index % len(dataset.class_names)] for index in range(options.pictures)]
    variants = {
        "float32": (checkpoint, None),
        "BF16": (checkpoint, torch.bfloat16),
        "FP8": (checkpoint / "inference", torch.bfloat16),
    }
    images_by_variant: dict[str, list[Image.Image]] = {}
    for name, (directory, precision) in variants.items():
        try:
            pipeline = loading.load_pipeline(directory, "ema", dataset)
            pipeline.text_encoder.float()  # excludes the text encoder's precision from the comparison
            pictures(pipeline, prompts, precision)
            images_by_variant[name], taken = pictures(pipeline, prompts, precision)
        except (RuntimeError, ValueError) as error:
            page.failed(name, error)
            continue
        page.row(
            name, f"{len(prompts) / taken:.2f}", f"{psnr(images_by_variant['float32'], images_by_variant[name]):.1f}"
        )
    shown = [
        (image, f"{name}: {prompt}")
        for name, images in images_by_variant.items()
        for image, prompt in zip(images, prompts, strict=True)
    ]
    sheet = contact_sheet([image for image, _ in shown], [text for _, text in shown], columns=options.pictures)
    sheet.save(options.out / "gpu-sampling.png")


def main() -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--steps", type=int, default=500, metavar="N", help="Steps of stage 2 (default: %(default)s).")
    parser.add_argument(
        "--stage1-steps", type=int, default=300, metavar="N", help="Steps of stage 1 (default: %(default)s)."
    )
    parser.add_argument(
        "--batch", type=int, default=64, metavar="IMAGES", help="Global batch size (default: %(default)s)."
    )
    parser.add_argument(
        "--pictures", type=int, default=8, metavar="N", help="Number of sampled images (default: %(default)s)."
    )
    parser.add_argument("--tiny", action="store_true", help="Use a small model, as a smoke test.")
    parser.add_argument("--out", type=Path, default=measure.RESULTS, metavar="FOLDER")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    manifest = manifests.read(options.dataset)
    options.classes = len(manifest.class_names) + 1
    options.rows = len(Store(manifest).valid_rows())
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        stage1, first = trained(options, work, 1, options.stage1_steps, None, fp8=False)
        report = convert(stage1, work / "start.fp8", Options(batch_size=min(16, options.batch), exports=("inference",)))
        shutil.rmtree(stage1)
        heading = [
            f"# {options.steps} steps after a conversion, batch {options.batch}, on {measure.device_name()}",
            "",
            f"torch {torch.__version__}. {options.rows} rows; stage 1 trained for {options.stage1_steps} steps to a "
            f"loss of {statistics.fmean(list(first.train.values())[-20:]):.4f}. Conversion: "
            f"{report['num_fp8_linears']} linears in FP8, {len(report['kept_in_bf16'])} kept, losses "
            f"{', '.join(f'{name} {loss:.4f}' for name, loss in report['losses'].items())}; acceptance checks "
            f"{'passed' if report['acceptance']['passed'] else 'FAILED'}.",
        ]
        page = measure.Page(options.out, "gpu-training", heading, ["loss", "BF16", "FP8", "FP8 / BF16"])
        losses = []
        for fp8 in (False, True):
            last, recorded = trained(options, work, 2, options.steps, work / "start.fp8", fp8=fp8)
            shutil.rmtree(last)
            losses.append(recorded)
        compare(page, *losses)
        sample(options, work / "start.fp8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
