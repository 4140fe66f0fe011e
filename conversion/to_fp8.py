"""`python -m conversion.to_fp8 CHECKPOINT`: a BF16 training checkpoint goes on in FP8, with calibrated scales.

Stage 1 becomes stage 2 on the way, unless told to keep it. The result is a checkpoint directory that training
goes on from: weights, average, moments, plan and scales, and a report of what became of each. The exit code is 0,
2 for bad input, with nothing written, and 3 where the result is written but does not pass its own checks.

`torchrun --nproc-per-node N -m conversion.to_fp8 ...` shares the batches of calibration among N ranks.
"""

import contextlib
import dataclasses
import json
import os
import platform
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from conversion.batches import CalibrationBatch, dataset_batches, synthetic_batches
from conversion.calibration.amax import calibrate, unmeasured
from conversion.calibration.plan import plan_by_rule
from conversion.export.writers import EXPORTS
from conversion.options import (
    AUTO,
    STATEFUL,
    TEXT_DIM,
    Options,
    Parser,
    add_options,
    check_apart,
    default_output,
    from_arguments,
)
from conversion.progress import Progress
from conversion.reading import formats
from conversion.report.html import page
from conversion.report.text import PAGE, REPORT, describe
from conversion.stage2 import strategies
from conversion.verification import acceptance, layer_selection, quantization_error
from pixart.checkpoint import directory as checkpoints
from pixart.checkpoint.directory import Checkpoint
from pixart.checkpoint.safetensors_stream import map_tensors
from pixart.data import manifest as manifests
from pixart.model.dit import DiT, load_model
from pixart.model.fp8.plan import check_rows
from pixart.training.process_group import process_group

HELD_OUT = 4  # batches that verification has for itself
STEPS = 7


def convert(source: str | Path, output: str | Path | None = None, options: Options | None = None) -> dict[str, Any]:
    """Converts, writes, and returns the report, whose `output` is the directory.

    Within a process group every rank calls it and calibrates on its share of the batches; the first does the rest, and
    the others return an empty report. Raises ValueError, with nothing written, for what the user can mend.
    """
    source, options = Path(source), with_device(options or Options())
    output = Path(output) if output else default_output(source)
    with Progress(STEPS, shown=first_rank()) as progress, ThreadPoolExecutor(2) as background:
        progress.begin(f"reading {source}")
        start, batches, data = prepare(source, output, options)
        plan = plan_by_rule(start, options, text_dim=batches[0].text.shape[-1])
        progress.begin("stage 1 to stage 2" if start.stage < options.stage else "no change of stage")
        result, fates, reparameterization = strategies.change_stage(start, options, batches[0])
        result = dataclasses.replace(result, plan=plan)  # apart from the source, against which it is checked
        if not first_rank():
            calibrate(result, load_model(result.config, result.model, options.device), batches, options)
            return {}
        with checkpoints.appearing(output) as partial:
            progress.begin("writing weights, average and moments")
            digest = background.submit(formats.file_hash, source)
            checkpoints.write_state(result, partial)
            result.model, result.ema, result.optimizer = checkpoints.load_state(partial, map_tensors)
            carried = background.submit(acceptance.carried_check, start, partial, fates)
            model = load_model(result.config, result.model, options.device)
            progress.begin(f"calibrating on {options.batches} batches")
            result, amax = calibrate(result, model, batches, options)
            progress.begin("verifying")
            result, layers, loss, cosine = measure(start, model, result, batches, options)
            progress.begin("comparing what was carried with its source")  # and hashing it: both are under way
            checks = [*acceptance.gate(layers, loss), carried.result()]
            assert result.plan is not None
            report = {
                "source": str(source),
                "source_format": start.provenance.get("source_format"),
                "source_sha256": digest.result(),
                "inferred": start.provenance.get("source_config") == "inferred from shapes",
                "output": str(output),
                "stages": [start.stage, result.stage],
                "step": start.step,
                "config": result.config,
                "data": data or "synthetic: unit-variance latents and text",
                "reparameterization": reparameterization,
                **{name: getattr(options, name) for name in ("recipe", "statistic", "margin", "history")},
                "batches": options.batches,
                "batch": options.batch,
                "layers": layers,
                "linears": len(result.plan.linears),
                "kept": dict(result.plan.kept),
                "unmeasured": unmeasured(amax, result.plan),
                "losses": loss,
                "gradient_cosine": cosine,
                "fates": {fate: list(fates.values()).count(fate) for fate in ("carried", "derived", "new")},
                "tensors": fates,
                "versions": {"torch": torch.__version__, "python": platform.python_version()},
                "gate": acceptance.as_report(checks),
            }
            progress.begin(f"writing {output}")
            write(result, report, partial, options)
    return report


def first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def with_device(options: Options) -> Options:
    there = torch.cuda.is_available()
    if options.device == "cuda" and not there:
        raise ValueError("--device cuda: this machine has none")
    return dataclasses.replace(options, device="cuda" if there and options.device != "cpu" else "cpu")


def prepare(source: Path, output: Path, options: Options) -> tuple[Checkpoint, list[CalibrationBatch], str | None]:
    """The source, batches to calibrate and to verify on, and the dataset that they are from, if it is there."""
    start = formats.read(source, base_image_size=options.base_latent_size)
    if output.exists() and not options.overwrite:
        raise ValueError(f"{output} exists: name another --output, or give --overwrite")
    if output.exists() and not (output / checkpoints.MARKER).exists():
        raise ValueError(f"{output} exists and is no checkpoint: it is not overwritten")
    check_apart(output, checkpoints.find(source) if start.provenance["source_format"] == formats.OWN else source)
    if start.stage > options.stage:
        raise ValueError(f"--stage {options.stage}: {source} is of stage {start.stage} already")
    if start.plan is not None:
        raise ValueError(f"{source} is an FP8 checkpoint already")
    data = options.data
    if data is None and start.dataset and (Path(start.dataset) / manifests.FILE).exists():
        data = start.dataset
    dataset_dim = manifests.read(data).text_dim if data else None
    text_dim = start.config.get("text_dim") or options.text_dim or dataset_dim or TEXT_DIM
    count = options.batches + HELD_OUT
    if data:
        batches = dataset_batches(data, start.normalization, count, options.batch)
    else:
        batches = synthetic_batches(start.config, text_dim, count, options.batch)
    text = batches[0].text
    if options.stage == 2 and text.shape[-1] != text_dim:
        raise ValueError(f"--data: text states are {text.shape[-1]} wide, the model reads {text_dim}")
    if options.device == "cuda" and options.recipe == STATEFUL:
        tokens = batches[0].latents[0, 0].numel() // start.config["patch_size"] ** 2
        counts = {"image tokens": tokens} | ({"states of text": text.shape[1]} if options.stage == 2 else {})
        check_rows(options.batch, counts)
    return start, batches, data


def measure(
    start: Checkpoint, model: DiT, result: Checkpoint, batches: Sequence[CalibrationBatch], options: Options
) -> tuple[Checkpoint, list[dict[str, Any]], dict[str, float], float | None]:
    """Figures of each layer, losses before and after, and the cosine of a first step's gradients, on batches held out.

    Linears that lose too much are taken out of the plan of the checkpoint returned, where that is left to us.
    """
    held_out, chooses = batches[options.batches :], AUTO in options.keep_bf16
    observed = quantization_error.observe(model, result, held_out)
    if chooses:
        result = layer_selection.without(result, layer_selection.by_output(observed.layers))
    loss = {f"stage {result.stage}, BF16": observed.loss}
    if start.stage < result.stage:
        loss = {"stage 1, BF16": acceptance.loss_before(start, held_out, options.device), **loss}

    def by_plan() -> tuple[dict[str, float], dict[str, Tensor]]:
        assert result.plan is not None
        sampled = [name for name in observed.gradients if name in result.plan.linears]
        copy = acceptance.quantized(model, result.plan, result.scales)
        found, gradients = acceptance.in_fp8(copy, held_out, sampled)
        return {**loss, f"stage {result.stage}, FP8": found}, gradients

    after, gradients = by_plan()
    if chooses and not acceptance.loss_gap(after) <= acceptance.LOSS_GAP:
        result = layer_selection.without(result, layer_selection.by_loss(result, model, batches))
        after, gradients = by_plan()
    assert result.plan is not None
    layers = [layer for layer in observed.layers if layer["name"] in result.plan.linears]
    return result, layers, after, acceptance.gradient_cosine(observed.gradients, gradients)


def write(result: Checkpoint, report: dict[str, Any], partial: Path, options: Options) -> None:
    """All but weights, average and moments, which are there."""
    result.provenance = {
        **result.provenance,
        "converted_from": str(Path(report["source"]).absolute()),  # by which it is found from anywhere
        "source_sha256": report["source_sha256"],
        "calibration_data": report["data"],
        "versions": report["versions"],
        "gate": "PASS" if report["gate"]["passed"] else "FAIL",
    }
    checkpoints.write(partial / REPORT, (json.dumps(report, indent=2) + "\n").encode())
    checkpoints.write(partial / PAGE, page(report).encode())
    for name in options.exports:
        EXPORTS[name](result, partial)
    checkpoints.write_record(result, partial)


def dry_run(source: Path, output: Path | None, options: Options) -> str:
    """What a conversion would do, of what can be said without measuring."""
    start, batches, data = prepare(source, output or default_output(source), options)
    plan = plan_by_rule(start, options, text_dim=batches[0].text.shape[-1])
    lines = [
        f"would read {source} (stage {start.stage}, step {start.step}, {start.provenance.get('source_format')})",
        f"would calibrate on {data or 'synthetic data'}",
        f"would write {output or default_output(source)}: {len(plan.linears)} linears in FP8 by {plan.recipe}",
        *(f"would keep {name} in BF16: {reason}" for name, reason in plan.kept.items()),
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    assert __doc__
    parser = Parser(prog="python -m conversion.to_fp8", description=__doc__.splitlines()[0])
    parser.add_argument(
        "checkpoint", type=Path, help="training checkpoint: .pt, safetensors, a directory, a run folder"
    )
    parser.add_argument("--output", type=Path, help="directory to write (default: beside the checkpoint, with .fp8)")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and write nothing")
    add_options(parser)
    parsed = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with process_group() if "RANK" in os.environ else contextlib.nullcontext():
        try:
            options = from_arguments(parsed)
            if parsed.dry_run:
                print(dry_run(parsed.checkpoint, parsed.output, options))
                return 0
            report = convert(parsed.checkpoint, parsed.output, options)
        except KeyboardInterrupt:
            print("interrupted: nothing is written", file=sys.stderr)
            return 130
        except (ValueError, OSError) as error:
            if first_rank():
                print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        if not first_rank():
            return 0
        print(describe(report))
        return 0 if report["gate"]["passed"] else 3


if __name__ == "__main__":
    sys.exit(main())
