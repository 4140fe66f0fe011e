"""Checks before a training job is submitted; each raises ValueError, with a one-line message, if it fails."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jobs.state import ledger, run
from jobs.state.audit_files import FOLDER, SUMMARY
from jobs.state.checkpoint_names import acceptance, find_checkpoint
from jobs.state.prompts import read_prompts
from pixart import records
from pixart.config.dataset import data_from_dict
from pixart.config.keys.overrides import parse
from pixart.config.latent_space import check_image_shapes, check_latent_space, recorded_pixel_range
from pixart.config.model import CHECKPOINT_NAMES, ModelConfig
from pixart.config.recipe import Recipe
from pixart.config.training import TrainConfig, resolve_fp8_backend

Record = dict[str, Any]  # metadata of a checkpoint


def find_start(start: str | None, resume: str | None) -> tuple[Path | None, Path | None]:
    """Return the checkpoint to start from and the run folder to resume in; None for each that is not asked for.

    Raises ValueError if both are given, or if the run still has an active job.
    """
    if start and resume:
        raise ValueError("--from starts a new run and --resume continues one; give only one of them")
    if not resume:
        return (find_checkpoint(start) if start else None), None
    folder = Path(resume).absolute()
    if (folder / run.RECORD).exists():
        elements = run.elements(run.load(folder))
        if run.is_active(elements):
            raise ValueError(f"--resume {resume}: the run is active as job {elements[0].job}; cancel it, or wait")
    return find_checkpoint(str(folder), or_older=True), folder


def check_start(recipe: Recipe, start: Path, record: Record, stage: int, overrides: Sequence[str]) -> None:
    """Check the checkpoint's stage, model configuration and step against what is asked for."""
    if record["stage"] != stage:
        raise ValueError(
            f"{start} is a checkpoint of stage {record['stage']}, not {stage}; convert it first, or give "
            f"--stage {record['stage']}"
        )
    for item in overrides:
        field, value = parse(item)
        size = record["config"].get(
            CHECKPOINT_NAMES.get(field.name, field.name)
        )  # a stage-2 checkpoint has no num_classes
        if field.owner is ModelConfig and size is not None and size != value:
            raise ValueError(f"{item}: the model of {start} has {field.name}={size}; leave it out")
    if record["step"] >= recipe.train(stage).steps:
        raise ValueError(
            f"{start} has done {record['step']} steps, and stage{stage}.steps={recipe.train(stage).steps}; set more"
        )


def check_acceptance(start: Path, record: Record) -> None:
    """Check that the conversion that wrote a checkpoint passed its acceptance checks."""
    if acceptance(record["provenance"]) == "FAIL":
        raise ValueError(
            f"{start} comes from a conversion that failed its acceptance checks (see its report.html); convert it "
            "again, or give --accept-failed-conversion"
        )


def check_configuration(recipe: Recipe, stage: int, ranks: int, record: Record | None, *, gpus: bool) -> None:
    """Check the configuration of one stage, apart from the dataset; `gpus` is whether the nodes have GPUs."""
    config = recipe.train(stage)
    check_sizes(recipe, stage, ranks)
    if recipe.sample.prompts and stage == 2:
        read_prompts(recipe.sample.prompts, "sample.prompts")
    if config.fp8 and not (record and record["plan"]):
        raise ValueError(
            f"stage {stage} trains in FP8 and needs a checkpoint that `python -m conversion.to_fp8` wrote; "
            f"give it by --from, or set stage{stage}.fp8=false"
        )
    if config.fp8 and record:
        check_backend(config, record["plan"]["recipe"], gpus=gpus)


def check_backend(config: TrainConfig, fp8_recipe: str, *, gpus: bool) -> None:
    """Check that the backend of a stage supports an FP8 recipe, and that the nodes have the GPUs that it needs."""
    if resolve_fp8_backend(config.fp8_backend, fp8_recipe) == "te" and not gpus:
        raise ValueError(
            f"FP8 by TransformerEngine needs GPUs, and the cluster profile has none; convert with another "
            f"--fp8-recipe than {fp8_recipe}, or give another --cluster"
        )


def check_pipeline(recipe: Recipe, ranks: int, *, gpus: bool) -> None:
    """Check the configuration of both stages of a pipeline; `gpus` is whether the nodes have GPUs."""
    for stage in (1, 2):
        check_sizes(recipe, stage, ranks)
    if recipe.stage1.fp8:
        raise ValueError(
            "stage1.fp8=true: in a pipeline stage 1 trains in BF16; FP8 starts with the conversion after it"
        )
    if recipe.stage2.fp8:
        check_backend(recipe.stage2, recipe.stage2.fp8_recipe, gpus=gpus)


def check_sizes(recipe: Recipe, stage: int, ranks: int) -> None:
    """Check that the batch divides over ranks and micro-batches, and that the model's sizes divide."""
    config, model = recipe.train(stage), recipe.model
    if config.global_batch_size % ranks:
        raise ValueError(
            f"stage{stage}.global_batch_size={config.global_batch_size} does not divide over {ranks} ranks"
        )
    if config.global_batch_size // ranks % config.gradient_accumulation_steps:
        raise ValueError(
            f"stage{stage}.gradient_accumulation_steps={config.gradient_accumulation_steps}: the "
            f"{config.global_batch_size // ranks} images of a rank do not divide into that many micro-batches"
        )
    if stage == 1 and config.short_caption_prob > 0:
        raise ValueError(f"stage1.short_caption_prob={config.short_caption_prob}: stage 1 reads no captions")
    for divisor, parts in ((model.num_heads, "heads"), (4, "sines and cosines of two axes")):
        if model.dim % divisor:
            raise ValueError(f"model.dim={model.dim}: does not divide into {divisor} {parts}")
    if model.cond_dim % 2:
        raise ValueError(f"model.cond_dim={model.cond_dim}: must be even")


def check_dataset(recipe: Recipe, stage: int, manifest: dict[str, Any], record: Record | None) -> None:
    """Check that the model of the recipe, or of the checkpoint, fits the dataset, and that this has what is read."""
    if stage == 2 and (manifest.get("adopted") or {}).get("form") == "labels":
        raise ValueError(
            f"dataset {recipe.data.path}: was adopted from shards of labels, without captions; stage 2 needs captions"
        )
    classes, sizes = len(manifest["class_names"]), recipe.model.num_classes
    channels = manifest["latent_shape"][0]
    if not record and recipe.model.in_dim != channels:
        raise ValueError(f"model.in_dim={recipe.model.in_dim}: the dataset's latents have {channels} channels")
    patch_size = record["config"].get("patch_size", recipe.model.patch_size) if record else recipe.model.patch_size
    for height, width in manifest.get("buckets") or [manifest["latent_shape"][1:]]:
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"model.patch_size={patch_size}: does not divide the dataset's latents of {height} x {width}"
            )
    if stage == 1 and not record and classes >= sizes:
        raise ValueError(
            f"model.num_classes={sizes}: the dataset has {classes} classes, and one more index is the null class; "
            f"give --set model.num_classes={classes + 1}"
        )
    check_contents(recipe, stage, record)
    if record is None:
        return
    config = record["config"]
    if config["in_dim"] != channels:
        raise ValueError(f"the checkpoint reads {config['in_dim']} latent channels, the dataset has {channels}")
    if stage == 2 and config["text_dim"] != manifest["text_dim"]:
        raise ValueError(
            f"the checkpoint reads text embeddings of width {config['text_dim']}, the dataset's have width "
            f"{manifest['text_dim']}"
        )
    check_latents("the checkpoint", record, recipe.data.path, manifest)


def check_contents(recipe: Recipe, stage: int, record: Record | None) -> None:
    """Check the largest label of the dataset's source for stage 1, and that it has words for stage 2."""
    contents = ledger.contents(recipe.data.path)
    if contents is None:
        return
    sizes = record["config"].get("num_classes") if record else recipe.model.num_classes
    largest = contents["largest_label"]
    if stage == 1 and sizes is not None and largest + 1 >= sizes:
        advice = "start from another checkpoint" if record else f"give --set model.num_classes={largest + 2}"
        raise ValueError(
            f"model.num_classes={sizes}: the largest label of the source {recipe.data.source} is {largest}, and one "
            f"more index is the null class; {advice}, or correct the labels"
        )
    if stage == 2 and recipe.data.captioner == "labels" and not contents["has_words"]:
        raise ValueError(
            f"dataset {recipe.data.path}: no item of the source {recipe.data.source} has words, and stage 2 needs "
            "captions; create a dataset with --set data.captioner=vllm, or name the captions by data.columns.caption"
        )


def check_resumed_shapes(recipe: Recipe, run_folder: Path, record: Record) -> None:
    """Check that a run is resumed on a dataset of the aspect buckets that it was trained on."""
    check_image_shapes(str(run_folder), record["provenance"], recipe.data.path, recipe.data.image_shapes)


def check_bucket_rows(dataset: str, ranks: int) -> None:
    """Check that each aspect bucket with images has at least one for every rank, as far as the audit has counted them.

    A bucket without images is left out of training.
    """
    name = f"{FOLDER}/{SUMMARY}"
    (text,) = ledger.read_files(dataset, [name])
    shapes = records.parse(text, dict[str, Any], f"{dataset}/{name}").get("shapes", []) if text else []
    for shape in shapes if len(shapes) > 1 else []:
        if 0 < shape["images"] < ranks:
            raise ValueError(
                f"dataset {dataset}: its aspect bucket {shape['width']}x{shape['height']} has {shape['images']} images "
                f"for {ranks} ranks; create it with fewer buckets, or give fewer --nodes"
            )


def check_latents(checkpoint: str, record: Record, dataset: str, manifest: dict[str, Any]) -> None:
    """Check that the latents of a checkpoint are of the same pixel range and models as those of a dataset."""
    check_latent_space(
        checkpoint,
        recorded_pixel_range(record),
        record.get("provenance", {}).get("models", {}),
        dataset,
        data_from_dict(manifest["data"]).pixel_range,
        manifest["models"],
    )
