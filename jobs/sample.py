"""The sample job: pictures of prompts from a checkpoint's average, one PNG each and one sheet of all."""

import json
from pathlib import Path
from typing import Any

from jobs.ledger import write_atomically
from jobs.tracking import Journal
from pixart.config import from_json

UNSEEN = 1  # added to the dataset's seed: the demo's scenes that training has not had


def run(run_folder: str, *, checkpoint: str, prompts: list[str]) -> dict[str, Any]:
    """Returns the sheet's path and, where the prompts are the demo's own scenes, the shares that came out right."""
    from PIL.PngImagePlugin import PngInfo

    from pixart import inference
    from pixart.data.scene_counter import count
    from pixart.data.scenes import caption, make_scene
    from pixart.sheet import contact_sheet

    configuration = from_json((Path(run_folder) / "config.json").read_text())
    directory = inference.find(checkpoint)
    scenes = []
    if not prompts and configuration.data.source == "demo":
        seed = configuration.data.seed + UNSEEN
        scenes = [make_scene(seed, index) for index in range(configuration.sample.count)]
        prompts = [caption(scene) for scene in scenes]
    elif not prompts:
        prompts = captions_of(configuration)
    images = pictures(configuration, directory, prompts)

    folder = Path(run_folder) / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(run_folder)
    for index, (prompt, image) in enumerate(zip(prompts, images, strict=True)):
        origin = PngInfo()
        origin.add_text("prompt", prompt)
        origin.add_text("checkpoint", str(directory))
        image.save(folder / f"{index:04d}.png", pnginfo=origin)
    sheet = Path(run_folder) / "samples.png"
    contact_sheet(images, prompts).save(sheet)
    journal.artifact(sheet)

    result: dict[str, Any] = {"sheet": str(sheet), "checkpoint": str(directory)}
    if scenes:
        import numpy as np

        counts = count(np.stack([np.asarray(image) for image in images]), scenes)
        result |= {"prompts": counts.total, "color": counts.color, "shape": counts.shape}
        journal.metrics(0, {"sample/color": counts.color, "sample/shape": counts.shape})
    write_atomically(Path(run_folder) / "samples.json", json.dumps({**result, "captions": prompts}, indent=2) + "\n")
    return result


def captions_of(configuration) -> list[str]:
    """The dataset's own first captions."""
    import pyarrow.parquet as pq

    parts = sorted((Path(configuration.data.path) / "captions").glob("*.parquet"))
    captions: list[str] = []
    for part in parts:
        table = pq.read_table(part, columns=["caption", "valid"]).to_pydict()
        captions += [text for text, valid in zip(table["caption"], table["valid"], strict=True) if valid]
        if len(captions) >= configuration.sample.count:
            break
    return captions[: configuration.sample.count]


def pictures(configuration, directory: Path, prompts: list[str]) -> list:
    """PIL images, one a prompt. A stage-1 checkpoint is sampled without a class: it reads no text."""
    import torch
    from PIL import Image

    from pixart import checkpoint as checkpoints
    from pixart import inference
    from pixart.data import manifest as manifests
    from pixart.data.text import TextEncoder
    from pixart.data.vae import decode, load_vae
    from pixart.model.dit import no_class
    from pixart.sampling import sample

    model, record = inference.load(directory)
    manifest = manifests.read(record["dataset"] or configuration.data.path)
    data, options = manifest.data, configuration.sample
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = model.to(device)
    normalization = checkpoints.normalization(record)
    if model.stage == 2:
        encoder = TextEncoder(data.text_encoder, tokens=data.text_tokens, scale=data.text_scale)
    vae = load_vae(data.vae)
    images = []
    for begin in range(0, len(prompts), 16):
        chunk = prompts[begin : begin + 16]
        if model.stage == 1:
            condition = null = {"label": no_class(model, len(chunk), device)}
        else:
            (text, mask), (null_text, null_mask) = encoder.encode(chunk), encoder.encode([""] * len(chunk))
            condition = {"text": text, "text_mask": mask}
            null = {"text": null_text, "text_mask": null_mask}
        latents = sample(
            model,
            condition,
            null,
            side=manifest.latent_shape[1],
            steps=options.steps,
            guidance=options.guidance,
            seed=options.seed + begin,
        )
        images += [Image.fromarray(image) for image in decode(vae, normalization.undo(latents))]
    return images
