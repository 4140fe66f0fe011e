"""The small dataset that a GPU day trains on, with its autoencoder and a text encoder that is small enough to carry.

The encoder is MiniLM with half the precision and only those words that the dataset's captions have: 22 MiB of 87.
"""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps

from jobs.tasks import caption, init_dataset, latents
from pixart.config.audit import AuditConfig
from pixart.config.dataset import DataConfig
from pixart.config.recipe import Recipe, to_json
from pixart.data.encoders.text_encoder import encoder_path, load_text_model
from pixart.data.encoders.vae import DEMO_VAE
from pixart.recipes import MINILM_STATE_STD, demo

SIZE, TOKENS, SHARDS = 256, 32, 4
ROWS = 512  # at most; a folder of fewer images gives several views of each
SCENES = 384
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def make_dataset(folder: Path, dataset: Path, images: Path | None, vae: Path | None) -> None:
    """Make the dataset from class folders of images, or from rendered scenes; its models are copied into `folder`.

    Paths within are relative to the working directory, where the day's parts run too.
    """
    encoder, autoencoder = folder / "encoder", folder / "vae"
    shutil.copytree(vae or DEMO_VAE, autoencoder)
    names = {"path": relative(dataset), "vae": relative(autoencoder), "text_encoder": relative(encoder)}
    settings = {"num_shards": SHARDS, "image_size": SIZE, "max_text_tokens": TOKENS, "text_scale": 1 / MINILM_STATE_STD}
    with tempfile.TemporaryDirectory() as temporary:
        if images:
            write_views(images, Path(temporary))
            prune(encoder, sorted(path.name for path in Path(temporary).iterdir()))
            data = DataConfig(source=temporary, **names, **settings)
        else:
            from pixart.demo.scenes import caption as caption_of
            from pixart.demo.scenes import make_scene

            prune(encoder, [caption_of(make_scene(0, index)) for index in range(SCENES)])
            data = DataConfig(source="demo", max_images=SCENES, **names, **settings)
        recipe = dataclasses.replace(demo(str(folder)), data=data, audit=AuditConfig(max_duplicates=1))
        make(recipe, list(range(SHARDS)))
    for captions in dataset.glob("captions/*"):
        captions.unlink()  # with their thumbnails; training reads the store alone


def make(recipe: Recipe, shards: list[int]) -> None:
    init_dataset.run(to_json(recipe))
    caption.run(recipe.data.path, shards)
    latents.run(recipe.data.path, shards)


def relative(path: Path) -> str:
    return str(path.relative_to(Path.cwd()))


def write_views(source: Path, target: Path) -> None:
    """Write crops and mirror images of every picture, in its class's folder, until there are ROWS of them."""
    files = sorted(path for path in source.glob("*/*") if path.is_file())
    each = max(1, ROWS // len(files))
    for path in files:
        folder = target / path.parent.name
        folder.mkdir(exist_ok=True)
        with Image.open(path) as image:
            for number, view in zip(range(each), views(image.convert("RGB")), strict=False):
                view.save(folder / f"{path.stem}-{number}.png")


def views(image: Image.Image) -> Iterator[Image.Image]:
    """The centre, four corners, and the mirror images of these."""
    width, height = image.size
    side = min(width, height)
    inner = min(SIZE, side)
    left, top = width - inner, height - inner
    boxes = [(left // 2, top // 2), (0, 0), (left, 0), (0, top), (left, top)]
    for mirrored in (False, True):
        for x, y in boxes:
            view = image.crop((x, y, x + inner, y + inner))
            yield ImageOps.mirror(view) if mirrored else view


def prune(target: Path, texts: Sequence[str]) -> None:
    """Write MiniLM in half precision with the tokens of these texts alone."""
    tokenizer, model = load_text_model("minilm")
    used = {token for text in texts for token in tokenizer(text)["input_ids"]}
    used |= set(tokenizer.convert_tokens_to_ids(list(SPECIAL)))
    kept = sorted(used)
    words = tokenizer.convert_ids_to_tokens(kept)
    model.get_input_embeddings().weight = torch.nn.Parameter(
        model.get_input_embeddings().weight[kept].clone(), requires_grad=False
    )
    model.config.vocab_size = len(kept)
    model.half().save_pretrained(target)
    source = json.loads(Path(encoder_path("minilm"), "tokenizer.json").read_text())
    source["model"]["vocab"] = {word: index for index, word in enumerate(words)}
    ids = dict(zip(words, range(len(words)), strict=True))
    source["added_tokens"] = [
        {**token, "id": ids[token["content"]]} for token in source["added_tokens"] if token["content"] in ids
    ]
    for special in source.get("post_processor", {}).get("special_tokens", {}).values():
        special["ids"] = [ids[word] for word in special["tokens"]]
    for pair in ("sep", "cls"):
        if pair in source.get("post_processor", {}):
            word, _ = source["post_processor"][pair]
            source["post_processor"][pair] = [word, ids[word]]
    (target / "tokenizer.json").write_text(json.dumps(source))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (file := Path(encoder_path("minilm"), name)).exists():
            shutil.copy(file, target)
