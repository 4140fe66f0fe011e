"""The sample job: PNG images and a contact sheet from a checkpoint, and the export of a diffusers pipeline."""

import json
import shlex
from pathlib import Path
from typing import Any

from jobs.state.journal import Journal
from jobs.state.ledger import write_atomically
from jobs.state.prompts import dataset_captions
from pixart.config.recipe import Recipe, from_json

UNSEEN = 1  # added to the dataset's seed, for demo scenes that are not in the training data
COLUMNS = 8  # of the contact sheet


def run(
    run_folder: str,
    *,
    checkpoint: str,
    weights: str = "ema",
    prompts: list[dict[str, str]],
    classes: list[int],
    per_prompt: int = 1,
    rewritten: str | None = None,
    export: str | None = None,
) -> dict[str, Any]:
    """Sample `per_prompt` images of each prompt or class, and write the export if a folder is given.

    Without prompts and classes, those of the dataset are taken; `rewritten` is the file of a recaption job that
    replaces the prompts. Returns the path of the contact sheet and, for the demo's scenes, the accuracy of color and
    shape; with an export alone, only its folder. Raises ValueError if the dataset's VAE or text encoder is not the one
    that it was created with.
    """
    from pixart.data import manifest as manifests
    from pixart.sampling import loading

    folder = Path(run_folder)
    configuration = from_json((folder / "config.json").read_text())
    dataset = manifests.read(configuration.data.path)
    directory = loading.find(checkpoint)
    for kind in ("vae", "text_encoder"):
        manifests.check_model(dataset, kind)
    pipeline = loading.load_pipeline(directory, weights, dataset, keep_text_decoder=export is not None)
    about = origin(folder, pipeline.transformer.stage, directory, weights, dataset)
    if rewritten:
        lines = [json.loads(line) for line in Path(rewritten).read_text().splitlines()]
        prompts = [{"prompt": line["text"], "request": line["request"]} for line in lines]
    if export:
        write_export(pipeline, Path(export), about)
        if not prompts and not classes:
            return {"export": export}

    scenes: list[Any] = []
    asked: list[dict[str, Any]] = list(prompts)
    if pipeline.transformer.stage == 1:
        asked = classes_of(pipeline, configuration, classes)
    elif not asked and configuration.data.source == "demo":
        scenes, asked = unseen_scenes(configuration)
    elif not asked:
        asked = [{"prompt": text} for text in dataset_captions(dataset.data.path, configuration.sample.count)]
    if not asked:
        raise ValueError(f"dataset {dataset.data.path} has no captions to sample: give --prompt")
    result = {**paint(folder, pipeline, configuration, asked, per_prompt, about), "export": export}
    if scenes:
        repeated = [scene for scene in scenes for _ in range(per_prompt)]
        result |= count_right(folder, repeated)
    write_atomically(folder / "samples.json", json.dumps(result, indent=2) + "\n")
    return result


def origin(folder: Path, stage: int, directory: Path, weights: str, dataset) -> dict[str, str]:
    """Return the provenance that is written into every image of the run."""
    from pixart.checkpoint.directory import MARKER
    from pixart.sampling.loading import INFERENCE_FILE

    in_fp8 = (directory / INFERENCE_FILE).exists()
    record = json.loads((directory / (INFERENCE_FILE if in_fp8 else MARKER)).read_text())
    git = folder / "git.txt"
    commit = {"commit": git.read_text().split(maxsplit=2)[1]} if git.exists() else {}
    captions = {"captions": f"adopted from {dataset.data.source}"} if dataset.adopted else {}
    return {
        "checkpoint": str(directory),
        "step": str(record["step"]),
        "stage": str(stage),
        "weights": f"{weights} in FP8" if in_fp8 else weights,
        "run": str(folder),
        "dataset": dataset.data.path,
        "dataset_hash": dataset.hash,
        **captions,
        **commit,
    }


def write_export(pipeline, target: Path, about: dict[str, str]) -> None:
    """Write the pipeline and its provenance to a folder, atomically."""
    from pixart.checkpoint.directory import atomic_directory

    with atomic_directory(target) as partial:
        pipeline.save_pretrained(partial)
        write_atomically(partial / "origin.json", json.dumps(about, indent=2) + "\n")


def classes_of(pipeline, configuration: Recipe, classes: list[int]) -> list[dict[str, Any]]:
    """Return the labels and names of the given classes, else of the dataset's first, else of the null class."""
    from pixart.sampling.pipeline import NULL_CLASS

    names, none = pipeline.config.id2label, pipeline.transformer.config.num_classes - 1
    labels = classes or list(range(len(names)))[: configuration.sample.count] or [none]
    return [
        {"label": label, "class_name": NULL_CLASS if label == none else names.get(str(label), str(label))}
        for label in labels
    ]


def unseen_scenes(configuration: Recipe) -> tuple[list, list[dict[str, Any]]]:
    """Return demo scenes that are not in the training data, and their prompts."""
    from pixart.demo.scenes import caption, make_scene

    seed = configuration.data.seed + UNSEEN
    scenes = [make_scene(seed, index) for index in range(configuration.sample.count)]
    return scenes, [{"prompt": caption(scene)} for scene in scenes]


def paint(
    folder: Path, pipeline, configuration: Recipe, asked: list[dict[str, Any]], each: int, about: dict[str, str]
) -> dict[str, Any]:
    """Generate and write the images, `each` of them per prompt, and the contact sheet.

    Image k of the run, counted from 0, has the seed `sample.seed` + k.
    """
    from pixart.sampling.contact_sheet import contact_sheet
    from pixart.sampling.images import SampleRequest, generate, save_png

    options, journal = configuration.sample, Journal(folder)
    repeated = [item for item in asked for _ in range(each)]
    pictures = [SampleRequest(seed=options.seed + index, **item) for index, item in enumerate(repeated)]
    pipeline.to(pipeline.vae.device)
    (folder / "samples").mkdir(exist_ok=True)
    images: list[Any] = []
    settings: list[dict[str, str]] = []
    how = {"steps": str(options.steps), "guidance": str(options.guidance)}
    for image in generate(pipeline, pictures, steps=options.steps, guidance=options.guidance):
        own, size = pictures[len(images)].settings(), f"{image.width}x{image.height}"
        whole = {**own, **how, "size": size, **about}
        save_png(image, folder / "samples" / f"{len(images):04d}.png", {**whole, "command": command(whole)})
        images.append(image)
        settings.append(own)
        journal.append({"step": len(images)})  # for the progress line
    sheet = folder / "samples.png"
    captions = [picture.caption for picture in pictures]
    columns = each if 1 < each <= COLUMNS else COLUMNS
    save_png(
        contact_sheet(images, captions, columns=columns), sheet, {**how, **about, "pictures": json.dumps(settings)}
    )
    journal.artifact(sheet)
    return {"sheet": str(sheet), "checkpoint": about["checkpoint"], "pictures": settings}


def command(settings: dict[str, str]) -> str:
    """Return the command line that samples this single image again."""
    what = ["--prompt", settings["prompt"]] if "prompt" in settings else ["--class", settings["class_index"]]
    values = [f"sample.{name}={settings[name]}" for name in ("seed", "steps", "guidance")]
    words = ["python", "-m", "jobs.launch", "sample", settings["checkpoint"], *what, "--dataset", settings["dataset"]]
    words += ["--weights", settings["weights"].split()[0], *(word for value in values for word in ("--set", value))]
    return shlex.join(words)


def count_right(folder: Path, scenes: list) -> dict[str, Any]:
    """Score the sampled images of demo scenes: return their number and the shares with the right color and shape."""
    import numpy as np
    from PIL import Image

    from pixart.demo.scene_scorer import score

    files = sorted((folder / "samples").glob("*.png"))
    accuracy = score([np.asarray(Image.open(file)) for file in files], scenes)
    Journal(folder).metrics(0, {"sample/color": accuracy.color, "sample/shape": accuracy.shape})
    return {"prompts": accuracy.total, "color": accuracy.color, "shape": accuracy.shape}
