"""The sample job: PNG images and a contact sheet from a checkpoint, and the export of a diffusers pipeline."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict

from jobs.state import evaluation
from jobs.state.checkpoint_names import INFERENCE, MARKER, find_weights
from jobs.state.journal import Journal
from jobs.state.prompts import dataset_captions
from pixart import records
from pixart.atomic import write_atomically
from pixart.config import recipe as recipe_file
from pixart.config.latent_space import recorded_pixel_range
from pixart.config.recipe import Recipe
from pixart.config.sampling import SampleConfig

UNSEEN = 1  # added to the dataset's seed, for demo scenes that are not in the training data
NULL_LABEL = -1  # stands for the null class in a request whose number of classes is not known
COLUMNS = 8  # of the contact sheet


class RewrittenRecord(TypedDict):
    """A request that was rewritten as a caption."""

    text: str
    request: str


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
    base_latent_size: int | None = None,
    ignore_unknown: bool = False,
    frames: bool = False,
    sizes: Sequence[Sequence[int]] = (),
) -> dict[str, Any]:
    """Sample `per_prompt` images of each prompt or class, and write the export if a folder is given.

    Without prompts and classes, those of the dataset are taken; `rewritten` is the file of a recaption job that
    replaces the prompts. With `frames`, also writes the image of each step and a GIF of them. A recipe without a
    dataset (`data.path` is empty) names the VAE and the text encoder itself. `base_latent_size` and
    `ignore_unknown` are for a checkpoint of another program, as `formats.read` describes them. `sizes` are heights and
    widths in pixels, each of which every image is sampled at; without any, it is the pipeline's default. Returns the
    path of the contact sheet and, for the demo's scenes, the accuracy of color and shape; with an export alone, only
    its folder. Raises ValueError if the checkpoint cannot be read, or does not fit the VAE, the text encoder, or the
    prompts or classes.
    """
    folder = Path(run_folder)
    configuration = recipe_file.load(folder / "config.json")
    path, _ = find_weights(checkpoint)
    model, record = load_weights(path, weights, base_latent_size, ignore_unknown=ignore_unknown)
    pipeline, sources = open_pipeline(model, record, configuration, path, export=export is not None)
    provenance = {**origin(folder, model.stage, record, path, weights), **sources}
    check_requests(pipeline, prompts, classes, checkpoint)
    if rewritten:
        lines = records.read_lines(Path(rewritten), RewrittenRecord)
        prompts = [{"prompt": line["text"], "request": line["request"]} for line in lines]
    shapes: list[tuple[int, int] | None] = [(height, width) for height, width in sizes] or [None]
    for shape in shapes:
        pipeline.latent_size(*(shape or (None, None)))
    if export:
        write_export(pipeline, Path(export), provenance, configuration, folder.parents[1])
        if not prompts and not classes:
            return {"export": export}

    scenes: list[Any] = []
    requests: list[dict[str, Any]] = list(prompts)
    if pipeline.transformer.stage == 1:
        requests = classes_of(pipeline, configuration, classes)
    elif not requests and not configuration.data.path:
        raise ValueError(f"{checkpoint}: without a dataset there are no captions to sample; give --prompt or --file")
    elif not requests and configuration.data.source == "demo":
        scenes, requests = unseen_scenes(configuration)
    elif not requests:
        requests = [{"prompt": text} for text in dataset_captions(configuration.data.path, configuration.sample.count)]
    if not requests:
        raise ValueError(f"dataset {configuration.data.path} has no captions to sample; give --prompt")
    painted = paint(folder, pipeline, configuration, requests, per_prompt, provenance, shapes, frames=frames)
    warning = "" if is_known(path) else guidance_warning(path, record, configuration.sample.guidance)
    result = {**painted, "export": export, "warning": warning}
    if scenes:
        repeated = [scene for _ in shapes for scene in scenes for _ in range(per_prompt)]
        result |= count_right(folder, repeated)
    write_atomically(folder / "samples.json", json.dumps(result, indent=2) + "\n")
    return result


def guidance_warning(checkpoint: Path, record: dict[str, Any], guidance: float) -> str:
    """Return a warning if a model that never saw the null condition in training is guided against it, else ""."""
    if guidance == 1 or record.get("provenance", {}).get("cond_dropout_prob") != 0:
        return ""
    return (
        f"warning: guidance is untrained: {checkpoint} was trained with cond_dropout_prob=0, so "
        f"sample.guidance={guidance:g} extrapolates from a null condition that it has not learned; "
        "--set sample.guidance=1 samples without guidance"
    )


def load_weights(checkpoint: Path, weights: str, base_latent_size: int | None, *, ignore_unknown: bool = False):
    """Return the model of a checkpoint and its record, which `pixart.sampling.loading.load` describes.

    The checkpoint is one of this suite, FP8 weights for inference, or any other that the conversion can read.
    """
    from conversion.reading import formats
    from pixart.checkpoint.directory import record_of
    from pixart.model.dit import load_model
    from pixart.sampling import loading

    if is_known(checkpoint):
        return loading.load(checkpoint, weights)
    start = formats.read(checkpoint, base_latent_size=base_latent_size, ignore_unknown=ignore_unknown)
    return load_model(start.config, start.ema if weights == "ema" else start.model).eval(), record_of(start)


def is_known(checkpoint: Path) -> bool:
    """Return whether a checkpoint is one of this suite, whose record the launcher reads as well."""
    return (checkpoint / INFERENCE).exists() or (checkpoint / MARKER).exists()


def open_pipeline(model, record: dict[str, Any], configuration: Recipe, checkpoint: Path, *, export: bool):
    """Return the pipeline of a model, and the names of what it was completed from, for the images' provenance."""
    from pixart.data import manifest as manifests
    from pixart.sampling import loading

    data = configuration.data
    if dataset := manifests.read(data.path) if data.path else None:
        for kind in ("vae", "text_encoder"):
            manifests.check_model(dataset, kind)
        components = loading.Components.of_dataset(dataset)
        sources = {"dataset": data.path, "dataset_hash": dataset.hash}
        if dataset.adopted:
            sources["captions"] = f"adopted from {dataset.data.source}"
    else:
        pixel_range = recorded_pixel_range(record)
        components = loading.Components.of_config(replace(data, pixel_range=pixel_range), model.stage)
        sizes = {"data.image_size": data.image_size, "model.base_latent_size": model.config.base_image_size}
        if model.stage == 2:
            sizes |= {"data.max_text_tokens": data.max_text_tokens, "data.text_scale": data.text_scale}
        sources = {"vae": data.vae, **({"text_encoder": data.text_encoder} if model.stage == 2 else {})}
        sources["sizes"] = " ".join(f"{key}={value}" for key, value in sizes.items())
    return loading.build_pipeline(model, record, components, name=str(checkpoint), keep_text_decoder=export), sources


def origin(folder: Path, stage: int, record: dict[str, Any], checkpoint: Path, weights: str) -> dict[str, str]:
    """Return the provenance that is written into every image of the run, apart from its VAE and text encoder."""
    git = folder / "git.txt"
    return {
        "checkpoint": str(checkpoint),
        "step": str(record["step"]),
        "stage": str(stage),
        "weights": f"{weights} in FP8" if (checkpoint / INFERENCE).exists() else weights,
        "run": str(folder),
        **({"commit": git.read_text().split(maxsplit=2)[1]} if git.exists() else {}),
    }


def check_requests(pipeline, prompts: list[dict[str, str]], classes: list[int], checkpoint: str) -> None:
    """Check that prompts are given for a model of stage 2 only, and existing classes for one of stage 1."""
    if pipeline.transformer.stage == 2 and classes:
        raise ValueError(f"--class: {checkpoint} is a checkpoint of stage 2, which samples prompts; give --prompt")
    if pipeline.transformer.stage == 1:
        if prompts:
            raise ValueError(f"--prompt: {checkpoint} is a checkpoint of stage 1, which samples classes; give --class")
        null = pipeline.transformer.config.num_classes - 1
        if unknown := [label for label in classes if label > null]:
            raise ValueError(f"--class {unknown[0]}: the classes are 0 to {null - 1}, and none")


def write_export(
    pipeline, target: Path, provenance: dict[str, str], configuration: Recipe, home: Path, name: str = ""
) -> None:
    """Write the pipeline, its model card, its provenance and the SHA-256 of all files to a folder, atomically.

    The card has the figures of the checkpoint's evaluations in `home`; its title is `name`, else that of the folder.
    """
    from pixart.atomic import atomic_directory
    from pixart.data.encoders.licences import licence_of
    from pixart.data.encoders.text_encoder import encoder_path
    from pixart.data.encoders.vae import vae_path
    from pixart.sampling.export import checksum_lines
    from pixart.sampling.model_card import CHECKSUMS, model_card

    stage, data, checkpoint = pipeline.transformer.stage, configuration.data, provenance["checkpoint"]
    licences = {"transformer": "to be chosen at publication", f"vae: {data.vae}": licence_of(vae_path(data.vae))}
    if stage == 2:
        licences[f"text encoder: {data.text_encoder}"] = licence_of(encoder_path(data.text_encoder))
    with atomic_directory(target) as partial:
        pipeline.save_pretrained(partial)
        card = model_card(
            name or target.name,
            stage,
            files=sorted(str(path.relative_to(partial)) for path in partial.rglob("*.py")),
            lineage=provenance,
            licences=licences,
            evaluations=evaluation.results_of(home, checkpoint),
        )
        write_atomically(partial / "README.md", card)
        write_atomically(partial / "origin.json", json.dumps(provenance, indent=2) + "\n")
        write_atomically(partial / CHECKSUMS, checksum_lines(partial))


def classes_of(pipeline, configuration: Recipe, classes: list[int]) -> list[dict[str, Any]]:
    """Return the labels and names of the given classes, else of the dataset's first, else of the null class."""
    from pixart.sampling.pipeline import NULL_CLASS

    names, null_class = pipeline.config.id2label, pipeline.transformer.config.num_classes - 1
    labels = [null_class if label == NULL_LABEL else label for label in classes]
    labels = labels or list(range(len(names)))[: configuration.sample.count] or [null_class]
    return [
        {"label": label, "class_name": NULL_CLASS if label == null_class else names.get(str(label), str(label))}
        for label in labels
    ]


def unseen_scenes(configuration: Recipe) -> tuple[list, list[dict[str, Any]]]:
    """Return demo scenes that are not in the training data, and their prompts."""
    from pixart.demo.scenes import caption, make_scene

    seed = configuration.data.seed + UNSEEN
    scenes = [make_scene(seed, index) for index in range(configuration.sample.count)]
    return scenes, [{"prompt": caption(scene)} for scene in scenes]


def paint(
    folder: Path,
    pipeline,
    configuration: Recipe,
    requests: list[dict[str, Any]],
    per_prompt: int,
    provenance: dict[str, str],
    shapes: Sequence[tuple[int, int] | None] = (None,),
    *,
    frames: bool = False,
) -> dict[str, Any]:
    """Generate and write the images, `per_prompt` of them per prompt and shape, and the contact sheet.

    Image k of the run, counted from 0, has the seed `sample.seed` + k. With `frames`, the image of step s is
    `samples/0000/step-000.png`, and all of them are `samples/0000.gif`.
    """
    from pixart.sampling.contact_sheet import contact_sheet
    from pixart.sampling.images import SampleRequest, generate, save_gif
    from pixart.sampling.png import save_png

    def save_frame(index: int, step: int, frame: Any) -> None:
        target = folder / "samples" / f"{index:04d}"
        target.mkdir(exist_ok=True)
        frame.save(target / f"step-{step:03d}.png")
        steps_of.setdefault(index, []).append(frame)

    steps_of: dict[int, list[Any]] = {}
    options, journal = configuration.sample, Journal(folder)
    repeated = [item for item in requests for _ in range(per_prompt)]
    pictures = [SampleRequest(seed=options.seed + index, **item) for index, item in enumerate(repeated * len(shapes))]
    pipeline.to(pipeline.vae.device)
    (folder / "samples").mkdir(exist_ok=True)
    images: list[Any] = []
    settings: list[dict[str, str]] = []
    sampling = {"steps": str(options.steps), "guidance": str(options.guidance)}
    on_frame = save_frame if frames else None
    for image in generate(
        pipeline, pictures, steps=options.steps, guidance=options.guidance, on_frame=on_frame, shapes=shapes
    ):
        request_settings, size = pictures[len(images)].settings(), f"{image.width}x{image.height}"
        # The size that was given is repeated, whether or not the checkpoint was trained at it.
        given = {} if shapes[0] is None else {"size_options": f"--size {size} --force-size"}
        metadata = with_command({**request_settings, **sampling, "size": size, **given, **provenance})
        save_png(image, folder / "samples" / f"{len(images):04d}.png", metadata)
        if frames:
            save_frame(len(images), options.steps - 1, image)
            save_gif(steps_of.pop(len(images)), folder / "samples" / f"{len(images):04d}.gif")
        images.append(image)
        settings.append(request_settings)
        journal.append({"step": len(images)})  # for the progress line
    sheet = folder / "samples.png"
    captions = [picture.caption for picture in pictures]
    columns = per_prompt if 1 < per_prompt <= COLUMNS else COLUMNS
    save_png(
        contact_sheet(images, captions, columns=columns, head=head(options, provenance, len(images))),
        sheet,
        {**sampling, **provenance, "pictures": json.dumps(settings)},
    )
    journal.artifact(sheet)
    return {"sheet": str(sheet), "checkpoint": provenance["checkpoint"], "pictures": settings}


def head(options: SampleConfig, provenance: dict[str, str], count: int) -> list[str]:
    """Return the lines above the images of a contact sheet."""
    seeds = f"seed {options.seed}" if count == 1 else f"seeds {options.seed} to {options.seed + count - 1}"
    return [
        f"{provenance['checkpoint']}, step {provenance['step']}, {provenance['weights']} weights",
        f"{options.steps} denoising steps, guidance {options.guidance:g}, {seeds}",
    ]


def with_command(settings: dict[str, str]) -> dict[str, str]:
    """Return the settings of an image with the command that samples it again."""
    return {**settings, "command": command(settings)}


def command(settings: dict[str, str]) -> str:
    """Return the command line that samples this single image again."""
    subject = ["--prompt", settings["prompt"]] if "prompt" in settings else ["--class", settings["class_index"]]
    values = [f"sample.{name}={settings[name]}" for name in ("seed", "steps", "guidance")]
    values += settings.get("sizes", "").split()
    words = ["python", "-m", "jobs.launch", "sample", settings["checkpoint"], *subject]
    for name in ("dataset", "vae", "text_encoder"):
        words += [f"--{name.replace('_', '-')}", settings[name]] if name in settings else []
    words += settings.get("size_options", "").split()
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
