"""What is refused before a training job is submitted: all that cannot work, in one line each."""

import argparse
from pathlib import Path
from typing import Any

from conversion.options import STATEFUL
from jobs.state import run
from jobs.state.checkpoint_names import find_checkpoint
from pixart.config.model import CHECKPOINT_NAMES
from pixart.config.recipe import Recipe
from pixart.config.training import resolve_fp8_backend

Record = dict[str, Any]  # of a checkpoint


def find_start(options: argparse.Namespace) -> tuple[Path | None, Path | None]:
    """The checkpoint to go on from, if any, and the run folder to continue in, if any."""
    if options.start and options.resume:
        raise ValueError("--from begins a run and --resume continues one: give one of them")
    if not options.resume:
        return (find_checkpoint(options.start) if options.start else None), None
    resumed = Path(options.resume).absolute()
    if (resumed / run.RECORD).exists():
        found = run.elements(run.load(resumed))
        if run.under_way(found):
            raise ValueError(f"--resume {options.resume}: it is under way as job {found[0].job}")
    return find_checkpoint(str(resumed), or_older=True), resumed


def check_start(recipe: Recipe, options: argparse.Namespace, start: Path | None, record: Record, stage: int) -> None:
    """The checkpoint's stage, its conversion's verdict, its size and its steps."""
    if record["stage"] != stage:
        raise ValueError(
            f"{start} is of stage {record['stage']}, not {stage}: convert it first, or give --stage {record['stage']}"
        )
    if options.start and record["provenance"].get("gate") == "FAIL" and not options.accept_failed_conversion:
        raise ValueError(
            f"{start} comes from a conversion that failed its checks (see its report.html): mend that, or give "
            "--accept-failed-conversion"
        )
    for item in options.overrides:
        name, _, value = item.removeprefix("model.").partition("=")
        own = record["config"].get(CHECKPOINT_NAMES.get(name, name))  # of stage 2, there is no number of classes
        if item.startswith("model.") and own is not None and str(own) != value:
            raise ValueError(f"{item}: {start} is a model with {name}={own}, and stays one")
    if record["step"] >= recipe.train(stage).steps:
        raise ValueError(
            f"{start} has done {record['step']} steps, stage{stage}.steps={recipe.train(stage).steps} leaves none to "
            "train"
        )


def check_configuration(recipe: Recipe, stage: int, ranks: int, record: Record | None, *, gpus: bool) -> None:
    """What fits together, or not, whatever the dataset; `gpus`: whether the nodes have any."""
    config = recipe.train(stage)
    check_sizes(recipe, stage, ranks)
    if config.fp8 and not (record and record["plan"]):
        raise ValueError(
            f"stage {stage} trains in FP8, from a checkpoint that `python -m conversion.to_fp8` wrote: "
            f"name it by --from, or set stage{stage}.fp8=false"
        )
    if config.fp8 and record:
        backend = resolve_fp8_backend(config.fp8_backend, record["plan"]["recipe"])
        if backend == "te" and not gpus:
            raise ValueError(
                f"FP8 by TransformerEngine needs GPUs, which this cluster's profile has none of: convert with another "
                f"--recipe than {record['plan']['recipe']}, or name another --cluster"
            )


def check_pipeline(recipe: Recipe, ranks: int) -> None:
    """Both stages, with the conversion between."""
    for stage in (1, 2):
        check_sizes(recipe, stage, ranks)
    if recipe.stage1.fp8:
        raise ValueError("stage1.fp8=true: FP8 begins with the conversion, after stage 1")
    if recipe.stage2.fp8:
        resolve_fp8_backend(recipe.stage2.fp8_backend, STATEFUL)


def check_sizes(recipe: Recipe, stage: int, ranks: int) -> None:
    """The batch over ranks and micro-batches, and the model's sizes among each other."""
    config, model = recipe.train(stage), recipe.model
    if config.global_batch_size % ranks:
        raise ValueError(
            f"stage{stage}.global_batch_size={config.global_batch_size} does not divide over {ranks} ranks"
        )
    if config.global_batch_size // ranks % config.gradient_accumulation_steps:
        raise ValueError(
            f"stage{stage}.gradient_accumulation_steps={config.gradient_accumulation_steps}: the "
            f"{config.global_batch_size // ranks} images of a rank do not divide into so many micro-batches"
        )
    if stage == 1 and config.short_caption_prob > 0:
        raise ValueError(f"stage1.short_caption_prob={config.short_caption_prob}: stage 1 reads no captions")
    for divisor, what in ((model.num_heads, "heads"), (4, "sines and cosines of two axes")):
        if model.dim % divisor:
            raise ValueError(f"model.dim={model.dim}: does not divide into {divisor} {what}")
    if model.cond_dim % 2:
        raise ValueError(f"model.cond_dim={model.cond_dim}: must be even")


def check_dataset(recipe: Recipe, stage: int, manifest: dict[str, Any], record: Record | None) -> None:
    """Whether this model, or the one of the checkpoint, can read the dataset."""
    classes, sizes = len(manifest["class_names"]), recipe.model.num_classes
    channels, side, _ = manifest["latent_shape"]
    if not record and recipe.model.in_dim != channels:
        raise ValueError(f"model.in_dim={recipe.model.in_dim}: the dataset's latents have {channels} channels")
    if not record and side % recipe.model.patch_size:
        raise ValueError(f"model.patch_size={recipe.model.patch_size}: does not divide latents of {side} x {side}")
    if stage == 1 and not record and classes >= sizes:
        raise ValueError(
            f"model.num_classes={sizes}: the dataset has {classes} classes, and one more index means no class; "
            f"give --set model.num_classes={classes + 1}"
        )
    if record is None:
        return
    config = record["config"]
    if config["in_dim"] != channels:
        raise ValueError(f"the checkpoint reads {config['in_dim']} latent channels, the dataset has {channels}")
    if stage == 2 and config["text_dim"] != manifest["text_dim"]:
        raise ValueError(
            f"the checkpoint reads text states of width {config['text_dim']}, the dataset's are {manifest['text_dim']} "
            "wide"
        )
    for kind, fingerprint in record["provenance"].get("models", {}).items():
        if fingerprint != manifest["models"][kind]:
            raise ValueError(
                f"the checkpoint has learnt from data of another {kind.replace('_', ' ')}: fingerprint {fingerprint}, "
                f"and the dataset's is {manifest['models'][kind]}"
            )
