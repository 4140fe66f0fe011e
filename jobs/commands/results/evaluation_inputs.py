"""Inputs of an evaluation, and their checks before anything is submitted: checkpoints, prompts, reference, models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from jobs.commands.options import RecipeOptions
from jobs.commands.results.components import check_checkpoint, open_training_dataset
from jobs.state import evaluation, ledger
from jobs.state.checkpoint_names import INFERENCE, MARKER, find_weights
from jobs.state.evaluation import Variant
from jobs.state.prompts import coco_captions, read_prompts, spaced_captions
from jobs.submission.launch import Launch
from jobs.tasks.evaluation.evaluate import too_few_images_for
from jobs.tasks.sample import UNSEEN
from pixart import records
from pixart.config.dataset import is_url
from pixart.evaluation import reference as references
from pixart.evaluation.extractor_names import parse
from pixart.evaluation.protocol import short_hash

Checkpoints = Sequence[tuple[Path, dict[str, Any]]]
NONE = "none"


def weights(text: str) -> str:
    """Return `text`. Raises ValueError unless it is ema or master."""
    if text not in ("ema", "master"):
        raise ValueError(f"{text!r} is not one of ema, master")
    return text


def find_checkpoints(names: Sequence[str], *, every: bool) -> list[tuple[Path, dict[str, Any]]]:
    """Return the checkpoints and their metadata; with `every`, all checkpoints of each run folder.

    Raises ValueError without one, and for one of another program, whose stage and step are not known.
    """
    if not names:
        raise ValueError("evaluate: there is no checkpoint; give a CHECKPOINT or a run folder")
    checkpoints: dict[Path, dict[str, Any]] = {}
    for name in names:
        markers = sorted(Path(name).absolute().glob(f"checkpoints/step-{8 * '[0-9]'}/{MARKER}")) if every else []
        for path in [str(marker.parent) for marker in markers] or [name]:
            checkpoint, record = find_weights(path)
            if record is None:
                raise ValueError(f"{path}: is a checkpoint of another program; convert it first")
            checkpoints[checkpoint] = record
    return list(checkpoints.items())


def common_stage(checkpoints: Checkpoints) -> int:
    """Return the stage of the checkpoints. Raises ValueError if they differ in it."""
    stages = {record["stage"]: path for path, record in checkpoints}
    if len(stages) > 1:
        raise ValueError(
            f"{stages[2]}: is a checkpoint of stage 2, and {stages[1]} is one of stage 1; evaluate them separately"
        )
    return next(iter(stages))


def open_dataset_of(launch: Launch, options: RecipeOptions, checkpoints: Checkpoints) -> dict[str, Any]:
    """Return the manifest of the dataset of all checkpoints, and set the recipe's `data` to it.

    Raises ValueError if one was trained on latents of another kind.
    """
    manifest = open_training_dataset(launch, options, *checkpoints[-1])
    for path, record in checkpoints:
        check_checkpoint(path, record, launch.dataset, manifest)
    return manifest


def variant(path: Path, record: dict[str, Any], weights: str, steps: int, guidance: float) -> Variant:
    """Return a checkpoint with its sampling settings. Raises ValueError if it does not have the weights."""
    if (path / INFERENCE).exists() and weights != "ema":
        raise ValueError(f"--weights {weights}: {path} has only EMA weights; give --weights ema")
    return Variant(
        checkpoint=str(path),
        stage=record["stage"],
        step=record["step"],
        record=short_hash(record),
        weights=weights,
        steps=steps,
        guidance=guidance,
    )


def make_prompts(
    launch: Launch, file: str | None, stage: int, manifest: dict[str, Any], checkpoints: Checkpoints
) -> list[dict[str, Any]]:
    """Return the prompts: of a file, of the dataset, or unseen scenes of the demo; classes in stage 1.

    Raises ValueError without any, or if a file has another format.
    """
    count, data = launch.recipe.evaluation.num_prompts, launch.recipe.data
    if stage == 1:
        if file:
            raise ValueError(f"--prompts {file}: stage 1 samples classes; leave the option out")
        names = list(manifest["class_names"])
        number = len(names) or checkpoints[0][1]["config"]["num_classes"] - 1
        labels = [index % number for index in range(count)]
        return [{"label": label, "class_name": names[label] if names else str(label)} for label in labels]
    if file and file != "dataset":
        prompts = read_prompt_file(Path(file))
        return [prompts[row] for row in references.spaced(len(prompts), count)]
    if data.source == "demo":
        return [{"scene": [data.seed + UNSEEN, index]} for index in range(count)]
    captions = spaced_captions(data.path, count)
    if not captions:
        raise ValueError(f"dataset {data.path} has no captions to sample; give --prompts")
    return [{"prompt": caption} for caption in captions]


def read_prompt_file(path: Path) -> list[dict[str, Any]]:
    """Return the prompts of a file: text, JSON lines with or without questions, or the captions of COCO."""
    from dataclasses import asdict

    from pixart.evaluation.prompt_following import read_question_file

    if path.suffix.lower() == ".json":
        return [{"prompt": caption} for caption in coco_captions(path)]
    if path.suffix.lower() != ".jsonl":
        return [{"prompt": item["prompt"]} for item in read_prompts(str(path), flag="--prompts")]
    prompts = []
    for prompt in read_question_file(path):
        questions = {"questions": [asdict(question) for question in prompt.questions]} if prompt.questions else {}
        prompts.append({"prompt": prompt.text, **questions, **({"tag": prompt.tag} if prompt.tag else {})})
    return prompts


def find_reference(launch: Launch, name: str | None, manifest: dict[str, Any]) -> evaluation.Reference:
    """Return the kind, path, hash, number of images and number of shards of the reference.

    Raises ValueError if it does not exist, has images of another size, or was made by another feature extractor.
    """
    config, size = launch.recipe.evaluation, launch.recipe.data.image_size
    if name is None and ledger.is_adopted(manifest):
        name = NONE  # the dataset has no images
    if name == NONE:
        return {"kind": "none", "path": "", "hash": "", "count": 0, "num_shards": 0}
    path = name or launch.dataset
    if Path(path).is_file():
        return statistics_reference(launch, Path(path))
    if other := ledger.manifest(path):
        if other["data"]["image_size"] != size:
            raise ValueError(
                f"--reference {path}: has images of {other['data']['image_size']} px, and the checkpoint samples "
                f"{size} px; name a reference of the same size"
            )
        if ledger.is_adopted(other):
            raise ValueError(f"--reference {path}: was adopted and has no images; name a folder of images")
        kind: Literal["dataset", "folder"] = "dataset"
        count, digest = min(other["images"], config.num_reference_images), other["hash"]
    elif Path(path).is_dir():
        files = references.list_images(Path(path))
        kind = "folder"
        count, digest = min(len(files), config.num_reference_images), references.folder_hash(files)
    else:
        raise ValueError(f"--reference {path}: does not exist; name a dataset, a folder of images or a statistics file")
    path = path if is_url(path) else str(Path(path).absolute())
    digest = short_hash([digest, count, size], 16)
    return {"kind": kind, "path": path, "hash": digest, "count": count, "num_shards": min(config.num_shards, count)}


def statistics_reference(launch: Launch, path: Path) -> evaluation.Reference:
    """Return the description of a file of statistics. Raises ValueError if its features are not comparable."""
    metadata = references.read_metadata(path)
    expected = {"features": launch.recipe.evaluation.features, "image_size": launch.recipe.data.image_size}
    references.check_metadata(path, metadata, **expected)
    return {
        "kind": "statistics",
        "path": str(path.absolute()),
        "hash": metadata["hash"],
        "count": metadata["count"],
        "num_shards": 0,
    }


def check_features(launch: Launch, reference: evaluation.Reference, num_images: int) -> None:
    """Check the feature extractor, and the number of images where the width of its features is known."""
    if reference["kind"] == "none":
        return
    config, dim = launch.recipe.evaluation, parse(launch.recipe.evaluation.features).dim
    if "fd" in config.distance_names and dim is not None:
        if num_images <= dim:
            raise ValueError(too_few_images_for(num_images, dim))
        if reference["count"] <= dim:
            raise ValueError(f"--reference {reference['path']}: {too_few_images_for(reference['count'], dim)}")
    if "prdc" in config.distance_names and min(num_images, reference["count"]) < 6:
        raise ValueError("evaluation.distances: prdc needs more than 5 images; leave it out or give more prompts")


def check_judging(
    judge: str | None, clip: str | None, prompts: Sequence[dict[str, Any]], stage: int, *, caption_back: bool
) -> None:
    """Check the judge and the CLIP model. Raises ValueError if there is nothing that they could judge."""
    if judge and stage == 1:
        raise ValueError(f"--judge {judge}: stage 1 samples classes, which have no questions; leave the option out")
    if judge and not caption_back and not any("questions" in prompt for prompt in prompts):
        raise ValueError(
            f"--judge {judge}: no prompt has questions; give --prompts with a file of GenEval 2 or GenEval, or "
            "--caption-back"
        )
    if caption_back and not judge:
        raise ValueError("--caption-back: needs the model that captions the images; give --judge MODEL")
    if judge and Path(judge).is_absolute() and not (Path(judge) / "config.json").is_file():
        raise ValueError(f"--judge {judge}: is no model folder; name a vision-language model by folder or hub name")
    if clip:
        config = Path(clip) / "config.json"
        model = records.read(config, dict[str, Any]).get("model_type") if config.is_file() else None
        if model != "clip":
            raise ValueError(f"--clip {clip}: is no CLIP model; name the folder of one that transformers reads")
        if stage == 1:
            raise ValueError(f"--clip {clip}: stage 1 samples classes, which have no prompts; leave the option out")


def absolute(name: str | None) -> str:
    """Return the absolute path of a model folder, since jobs run elsewhere; a hub name stays, and None is ""."""
    return "" if name is None else str(Path(name).absolute()) if Path(name).exists() else name


def read_results(folder: Path) -> dict[str, Any]:
    """Return the results of an evaluation. Raises ValueError if it has none yet."""
    path = folder / evaluation.RESULTS
    if not path.is_file():
        raise ValueError(f"{folder}: has no results; run the command 'evaluate' again to complete it")
    return records.read(path, evaluation.Results)
