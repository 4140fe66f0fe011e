"""`python -m conversion.to_fp8 CHECKPOINT`: a BF16 training checkpoint goes on in FP8, with calibrated scales.

Stage 1 becomes stage 2 on the way, unless told to keep it. The result is a checkpoint directory that training
goes on from: weights, average, moments, plan and scales, and a report of what became of each.
"""

import argparse
import dataclasses
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from conversion import formats, reparameterize
from conversion.calibrate import (
    CalibrationBatch,
    batch_loss,
    dataset_batches,
    mean_loss,
    measure_amax,
    synthetic_batches,
    without_class,
)
from conversion.plan import make_plan
from pixart import checkpoint as checkpoints
from pixart.checkpoint import Checkpoint
from pixart.data import manifest as manifests
from pixart.model import fp8

TEXT_DIM = 2048  # T5Gemma-XL, the text encoder of the real run
ERROR_T = (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)
REPORT = "conversion.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """What a conversion did and measured; `output_error` is relative, by way and t."""

    source: str
    source_sha256: str
    stages: tuple[int, int]
    step: int
    config: dict[str, Any]
    data: str
    way: str | None
    output_error: dict[str, list[float]]
    fates: dict[str, str]
    linears: int
    kept: dict[str, str]
    unmeasured: list[str]  # slots that no value reached
    losses: dict[str, float]
    gradient_cosine: float  # of the first step's weight gradients, FP8 against BF16 weights in float32


def convert(
    source: str | Path,
    output: str | Path | None = None,
    *,
    stage: int | None = None,
    way: reparameterize.Way = "fitted",
    data: str | None = None,
    text_dim: int | None = None,
    base_image_size: int | None = None,
    batches: int = 8,
    batch: int = 16,
    history: int = 16,
    margin: int = 0,
) -> tuple[Path, Report]:
    """Converts and writes; `stage` 1 keeps a stage-1 model of stage 1. Raises ValueError, with nothing written."""
    source = Path(source)
    start = formats.read(source, base_image_size=base_image_size)
    output = Path(output) if output else source.with_name(f"{source.stem if source.is_file() else source.name}.fp8")
    check_output(output, source)
    stage = stage or 2
    if start.stage > stage:
        raise ValueError(f"--stage {stage}: {source} is of stage {start.stage} already")
    if start.plan is not None:
        raise ValueError(f"{source} is an FP8 checkpoint already")

    data = data or (start.dataset if start.dataset and (Path(start.dataset) / manifests.FILE).exists() else None)
    wide = start.config.get("text_dim") or text_dim or (manifests.read(data).text_dim if data else TEXT_DIM)
    if data:
        drawn = dataset_batches(data, start.normalization, batches, batch)
    else:
        drawn = synthetic_batches(start.config, wide, batches, batch)
    if stage == 2 and drawn[0].text.shape[-1] != wide:
        raise ValueError(f"--data: text states are {drawn[0].text.shape[-1]} wide, the model reads {wide}")

    result, fates = start, dict.fromkeys(start.model, "carried")
    errors: dict[str, list[float]] = {}
    if start.stage < stage:
        for candidate in reparameterize.WAYS:
            attempt, attempt_fates = reparameterize.to_stage2(start, candidate, wide, drawn[0].latents)
            errors[candidate] = measure_error(start, attempt, drawn[0])
            if candidate == way:
                result, fates = attempt, attempt_fates
    result, unmeasured = calibrate(result, drawn, history=history, margin=margin, batch=batch)
    losses, cosine = verify(start, result, drawn)

    digest = formats.file_hash(source)
    report = Report(
        source=str(source),
        source_sha256=digest,
        stages=(start.stage, result.stage),
        step=start.step,
        config=result.config,
        data=data or "synthetic: unit-variance latents and text",
        way=way if start.stage < stage else None,
        output_error=errors,
        fates=fates,
        linears=len(result.plan.linears) if result.plan else 0,
        kept=dict(result.plan.kept) if result.plan else {},
        unmeasured=unmeasured,
        losses=losses,
        gradient_cosine=cosine,
    )
    result.provenance = {
        **result.provenance,
        "converted_from": str(source.absolute()),
        "source_sha256": digest,
        "calibration_data": report.data,
        "torch": torch.__version__,
    }
    checkpoints.save(result, output)
    (output / REPORT).write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
    return output, report


def check_output(output: Path, source: Path) -> None:
    """Only an earlier conversion of the same source is replaced."""
    if not output.exists():
        return
    try:
        earlier = checkpoints.read_record(output)["provenance"].get("converted_from")
    except ValueError:
        earlier = None
    if earlier != str(source.absolute()):
        raise ValueError(f"{output} exists and is no earlier conversion of {source}: name another --output")


def measure_error(start: Checkpoint, attempt: Checkpoint, batch: CalibrationBatch) -> list[float]:
    stage1 = reparameterize.load_model(start.config, start.model)
    stage2 = reparameterize.load_model(attempt.config, attempt.model)
    t = torch.tensor(ERROR_T)
    return reparameterize.output_error(stage1, stage2, batch.latents, batch.text, batch.text_mask, t).tolist()


def calibrate(
    checkpoint: Checkpoint, batches: list[CalibrationBatch], *, history: int, margin: int, batch: int
) -> tuple[Checkpoint, list[str]]:
    """The checkpoint with a plan and measured scales, and the names of the slots that nothing reached."""
    model = reparameterize.load_model(checkpoint.config, checkpoint.model)
    plan = make_plan(model, history=history, margin=margin, batch=batch)
    amax = measure_amax(model, plan, batches)
    fp8.set_amax(model, amax, plan)
    unmeasured = [
        f"{name}.{slot}"
        for name, values in amax.items()
        for slot, value in zip(fp8.SLOTS, values, strict=True)
        if not value
    ]
    return dataclasses.replace(checkpoint, plan=plan, scales=fp8.scale_state(model)), unmeasured


def verify(start: Checkpoint, result: Checkpoint, batches: list[CalibrationBatch]) -> tuple[dict[str, float], float]:
    """Losses on the same batches before, after and in FP8, and the cosine of the first step's gradients."""
    before = reparameterize.load_model(start.config, start.model)
    compared = [without_class(before, batch) for batch in batches] if before.stage == 1 else batches
    after = reparameterize.load_model(result.config, result.model)
    quantized = reparameterize.load_model(result.config, result.model)
    assert result.plan is not None
    fp8.swap_linears(quantized, result.plan)
    fp8.load_scale_state(quantized, result.scales)
    losses = {
        f"stage {start.stage}, as given": mean_loss(before, compared),
        f"stage {result.stage}, before FP8": mean_loss(after, compared),
        f"stage {result.stage}, FP8": mean_loss(quantized, compared),
    }
    gradients = []
    for model in (after, quantized):
        batch_loss(model, compared[0], seed=0).backward()
        names = result.plan.linears
        gradients.append(torch.cat([model.get_submodule(name).weight.grad.flatten() for name in names]))
    return losses, torch.nn.functional.cosine_similarity(*gradients, dim=0).item()


def describe(report: Report, output: Path) -> str:
    """The report as lines for a terminal."""
    counts = Counter(report.fates.values())
    sizes = ", ".join(f"{key} {value}" for key, value in report.config.items())
    lines = [
        f"read        {report.source} (stage {report.stages[0]}, step {report.step})",
        f"model       stage {report.stages[1]}: {sizes}",
        f"data        {report.data}",
        "tensors     " + ", ".join(f"{count} {fate}" for fate, count in sorted(counts.items())),
    ]
    if report.data.startswith("synthetic"):
        lines.append(
            "WARNING     scales come from synthetic data: name the run's own dataset by --data for scales that fit it"
        )
    if report.output_error:
        lines.append(
            "error over t " + " ".join(f"{t:>8.2f}" for t in ERROR_T) + "   (relative, against stage 1 without a class)"
        )
        for way, errors in report.output_error.items():
            mark = "  <- written" if way == report.way else ""
            lines.append(f"  {way:<10} " + " ".join(f"{error:>8.2%}" for error in errors) + mark)
    reasons = Counter(report.kept.values())
    kept = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
    lines.append(f"FP8         {report.linears} linears by delayed scaling; BF16: {kept}")
    if report.unmeasured:
        zero = len(report.unmeasured)
        lines.append(f"no scale    {zero} gradients are zero until the text is used; their scales follow in training")
    lines += [f"loss        {loss:.5f}  {name}" for name, loss in report.losses.items()]
    lines.append(f"gradient    cosine {report.gradient_cosine:.4f} of FP8 against full precision, first step")
    lines.append(f"written     {output}")
    lines.append(f"next        python -m jobs.launch train --stage {report.stages[1]} --from {output}")
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m conversion.to_fp8", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a training .pt file, a checkpoint directory or a run folder")
    parser.add_argument("--output", help="directory to write (default: beside the checkpoint, with .fp8)")
    parser.add_argument("--stage", type=int, choices=(1, 2), help="1 keeps stage 1 (default: 2)")
    parser.add_argument("--reparam", choices=reparameterize.WAYS, default="fitted", help="from stage 1 to stage 2")
    parser.add_argument("--data", help="dataset to calibrate on (default: the checkpoint's own, else synthetic)")
    parser.add_argument(
        "--text-dim", type=int, help=f"width of the text states (default: the dataset's, else {TEXT_DIM})"
    )
    parser.add_argument(
        "--base-image-size", type=int, help=f"latent side of a .pt file's model (default: {formats.BASE_IMAGE_SIZE})"
    )
    parser.add_argument("--batches", type=int, default=8, help="calibration batches")
    parser.add_argument("--batch", type=int, default=16, help="images in each")
    parser.add_argument("--history", type=int, default=16, help="rows of amax history")
    parser.add_argument("--margin", type=int, default=0, help="powers of two of headroom")
    options = parser.parse_args(arguments)
    for name, least in (("batches", 1), ("batch", 1), ("history", 2), ("margin", 0)):
        if getattr(options, name) < least:
            parser.error(f"--{name} must be at least {least}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    try:
        output, report = convert(
            options.checkpoint,
            options.output,
            stage=options.stage,
            way=options.reparam,
            data=options.data,
            text_dim=options.text_dim,
            base_image_size=options.base_image_size,
            batches=options.batches,
            batch=options.batch,
            history=options.history,
            margin=options.margin,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(describe(report, output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
