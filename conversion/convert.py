"""Conversion of a BF16 training checkpoint to FP8 with calibrated scales; `conversion.to_fp8` is its command line."""

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from conversion.batches import CalibrationBatch, dataset_batches, synthetic_batches
from conversion.calibration.amax import calibrate, uncalibrated_slots
from conversion.calibration.plan import plan_from_options
from conversion.export.writers import EXPORTS
from conversion.options import (
    STATEFUL,
    TEXT_DIM,
    Options,
    check_output_apart,
    default_output,
)
from conversion.progress import Progress
from conversion.reading import formats
from conversion.reading.training_state import INFERRED
from conversion.report.html import page
from conversion.report.text import PAGE, REPORT, SYNTHETIC, describe_source, next_command
from conversion.stage2 import strategies
from conversion.stage2.reparameterize import CARRIED, DERIVED, NEW
from conversion.verification import acceptance
from conversion.verification.verify import verify
from pixart.atomic import atomic_directory, write_file
from pixart.checkpoint import directory as checkpoints
from pixart.checkpoint.directory import Checkpoint
from pixart.checkpoint.safetensors_stream import map_tensors
from pixart.data import manifest as manifests
from pixart.model.dit import load_model
from pixart.model.fp8.plan import check_gemm_alignment

NUM_VALIDATION_BATCHES = 4  # for verification, distinct from the calibration batches
NUM_STEPS = 7  # of the progress bar


def convert(source: str | Path, output: str | Path | None = None, options: Options | None = None) -> dict[str, Any]:
    """Convert the checkpoint `source`, write it to `output`, and return the report.

    In a process group every rank calls this function and calibrates on its share of the batches; rank 0 does everything
    else, and the other ranks return an empty report. Raises ValueError, with nothing written, for invalid input.
    """
    source, options = formats.locate(Path(source)), resolve_device(options or Options())
    output = Path(output) if output else default_output(source)
    with Progress(NUM_STEPS, enabled=is_rank_zero()) as progress, ThreadPoolExecutor(2) as background:
        progress.begin(f"reading {source}")
        start, batches, dataset = prepare(source, output, options)
        # Of a dataset with aspect buckets there may be more, so that each bucket is calibrated on.
        options = dataclasses.replace(options, num_batches=len(batches) - NUM_VALIDATION_BATCHES)
        plan = plan_from_options(start, options, text_dim=batches[0].text.shape[-1])
        progress.begin("converting stage 1 to stage 2" if start.stage < options.stage else "keeping the stage")
        result, provenance, reparameterization = strategies.change_stage(start, options, batches[0])
        result = dataclasses.replace(result, plan=plan)  # a copy: `start` is compared with the written files below
        if not is_rank_zero():
            calibrate(result, load_model(result.config, result.model, options.device), batches, options)
            return {}
        with atomic_directory(output) as partial:
            progress.begin("writing weights, EMA and moments")
            digest = background.submit(formats.file_hash, source)
            checksums = checkpoints.write_state(result, partial)
            result.model, result.ema, result.optimizer = checkpoints.load_state(partial, map_tensors)
            carried = background.submit(acceptance.check_carried_tensors, start, partial, provenance)
            model = load_model(result.config, result.model, options.device)
            progress.begin(f"calibrating on {options.num_batches} batches")
            result, amax = calibrate(result, model, batches, options)
            progress.begin(f"verifying on {NUM_VALIDATION_BATCHES} batches")
            result, layers, losses, cosine = verify(start, model, result, batches, options)
            progress.begin("comparing carried tensors with the source")  # waits for the background tasks
            checks = [*acceptance.check_losses_and_grads(layers, losses), carried.result()]
            assert result.plan is not None
            report = {
                "source": str(source),
                "source_format": start.provenance.get("source_format"),
                "source_sha256": digest.result(),
                "config_inferred": start.provenance.get("source_config") == INFERRED,
                "output": str(output),
                **training_of_source(start, result.stage),
                "step": start.step,
                "config": result.config,
                "calibration_latents": sorted({tuple(b.latents.shape[-2:]) for b in batches[: options.num_batches]}),
                "calibration_data": dataset or f"{SYNTHETIC}: unit-variance latents and text",
                "reparameterization": reparameterization,
                "fp8_recipe": options.fp8_recipe,
                "amax_statistic": options.amax_statistic,
                "margin": options.margin,
                "amax_history_len": options.amax_history_len,
                "num_batches": options.num_batches,
                "batch_size": options.batch_size,
                "layers": layers,
                "num_fp8_linears": len(result.plan.linears),
                "kept_in_bf16": dict(result.plan.kept),
                "uncalibrated": uncalibrated_slots(amax, result.plan),
                "losses": losses,
                "gradient_cosine_similarity": cosine,
                "tensor_counts": {kind: list(provenance.values()).count(kind) for kind in (CARRIED, DERIVED, NEW)},
                "tensor_provenance": provenance,
                "versions": {"torch": torch.__version__, "python": platform.python_version()},
                "acceptance": acceptance.as_report(checks),
                "next_command": next_command(
                    options,
                    output,
                    start.dataset,
                    decay_qk_norm=start.provenance.get("decay_qk_norm", False),
                ),
            }
            progress.begin(f"writing {output}")
            write(result, report, partial, options, checksums)
    return report


def training_of_source(start: Checkpoint, stage: int) -> dict[str, Any]:
    """Return the part of the report about the training of `start`, which is converted to `stage`."""
    is_suite_checkpoint = start.provenance["source_format"] == formats.SUITE_FORMAT
    return {
        "stages": [start.stage, stage],
        "skipped_extra_states": {} if is_suite_checkpoint else start.provenance.get("skipped_extra_states", {}),
        "unused_entries": {} if is_suite_checkpoint else start.provenance.get("unused_entries", {}),
        "dropped_tensors": {} if is_suite_checkpoint else start.provenance.get("dropped_tensors", {}),
        "cond_dropout_prob": start.provenance.get("cond_dropout_prob"),
        "decay_qk_norm": start.provenance.get("decay_qk_norm", False),
    }


def is_rank_zero() -> bool:
    """Return whether this process is rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def resolve_device(options: Options) -> Options:
    """Replace the device `auto`. Raises ValueError if `cuda` is requested and not available."""
    available = torch.cuda.is_available()
    if options.device == "cuda" and not available:
        raise ValueError("--device cuda: CUDA is not available on this machine; give --device cpu")
    return dataclasses.replace(options, device="cuda" if available and options.device != "cpu" else "cpu")


def prepare(source: Path, output: Path, options: Options) -> tuple[Checkpoint, list[CalibrationBatch], str | None]:
    """Read the source and the batches for calibration and verification; check that they fit each other.

    Returns the checkpoint, the batches, and the dataset that they were drawn from (None for synthetic data). Raises
    ValueError for invalid input.
    """
    start = formats.read(source, base_latent_size=options.base_latent_size, ignore_unknown=options.ignore_unknown)
    if output.exists() and not options.overwrite:
        raise ValueError(f"{output} exists; choose another --output, or give --overwrite")
    if output.exists() and not (output / checkpoints.MARKER).exists():
        raise ValueError(f"{output} exists and is not a checkpoint, so it is not overwritten; choose another --output")
    is_suite_checkpoint = start.provenance["source_format"] == formats.SUITE_FORMAT
    check_output_apart(output, checkpoints.find(source) if is_suite_checkpoint else source)
    if start.stage > options.stage:
        raise ValueError(f"--stage {options.stage}: {source} is already a stage-{start.stage} checkpoint")
    if start.plan is not None:
        raise ValueError(f"{source} is already an FP8 checkpoint; conversion starts from a BF16 checkpoint")
    dataset = options.calibration_dataset
    if dataset is None and start.dataset and (Path(start.dataset) / manifests.FILE).exists():
        dataset = start.dataset
    manifest = manifests.read(dataset) if dataset else None
    dataset_dim = manifest.text_dim if manifest else None
    text_dim = start.config.get("text_dim") or options.text_dim or dataset_dim or TEXT_DIM
    count = max(options.num_batches, len(manifest.buckets) if manifest else 0) + NUM_VALIDATION_BATCHES
    if dataset:
        batches = dataset_batches(dataset, start, count, options.batch_size)
    else:
        batches = synthetic_batches(start.config, text_dim, count, options.batch_size)
    text = batches[0].text
    if options.stage == 2 and text.shape[-1] != text_dim:
        raise ValueError(f"--dataset: its text embeddings have {text.shape[-1]} dimensions, the model reads {text_dim}")
    if options.device == "cuda" and options.fp8_recipe == STATEFUL:
        sizes = sorted({(batch.latents.shape[-2], batch.latents.shape[-1]) for batch in batches})
        counts = {
            f"image tokens of {height}x{width} latents": height * width // start.config["patch_size"] ** 2
            for height, width in sizes
        }
        counts |= {"text tokens": text.shape[1]} if options.stage == 2 else {}
        check_gemm_alignment(options.batch_size, counts)
    return start, batches, dataset


def write(
    result: Checkpoint,
    report: dict[str, Any],
    partial: Path,
    options: Options,
    checksums: Mapping[str, Sequence[int]],
) -> None:
    """Write the scales, report, exports and metadata beside the weights, EMA and moments that are already written.

    `checksums` has the length and CRC-32C of these files.
    """
    result.provenance = {
        **result.provenance,
        "converted_from": str(Path(report["source"]).absolute()),
        "source_sha256": report["source_sha256"],
        "calibration_data": report["calibration_data"],
        "versions": report["versions"],
        "acceptance": "PASS" if report["acceptance"]["passed"] else "FAIL",
    }
    write_file(partial / REPORT, (json.dumps(report, indent=2) + "\n").encode())
    write_file(partial / PAGE, page(report).encode())
    for name in options.exports:
        EXPORTS[name](result, partial)
    checkpoints.write_metadata(result, partial, checksums)


def dry_run(source: Path, output: Path | None, options: Options) -> str:
    """Describe what the conversion would do, without calibrating or writing anything."""
    source = formats.locate(source)
    start, batches, dataset = prepare(source, output or default_output(source), options)
    plan = plan_from_options(start, options, text_dim=batches[0].text.shape[-1])
    lines = [
        f"would read {source} (stage {start.stage}, step {start.step}, {start.provenance.get('source_format')})",
        *describe_source(training_of_source(start, options.stage)),
        f"would calibrate on {dataset or 'synthetic data'}",
        f"would write {output or default_output(source)}: {len(plan.linears)} linears in FP8, recipe {plan.recipe}",
        *(f"would keep {name} in BF16: {reason}" for name, reason in plan.kept.items()),
    ]
    return "\n".join(lines)
