"""The small training dataset of `gpu_day`, with its autoencoder and a reduced text encoder.

The encoder is MiniLM in float16 with the vocabulary of the dataset's captions, which reduces it from 87 to 22 MiB.
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
from pixart.config.dataset import AuditConfig, DataConfig
from pixart.config.recipe import Recipe, to_json
from pixart.data.encoders.text_encoder import encoder_path, load_text_model
from pixart.data.encoders.vae import DEMO_VAE
from pixart.recipes import MINILM_STATE_STD, demo

SIZE, TOKENS, SHARDS = 256, 32, 4
ROWS = 512  # target number of images; a source of fewer images contributes several views of each
SCENES = 384
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def make_dataset(folder: Path, dataset: Path, images: Path | None, vae: Path | None) -> None:
    """Create the dataset from class folders of images, or from rendered scenes if `images` is None.

    Its models are copied to `folder`. The manifest's paths are relative to the working directory, from which the parts
    of `gpu_day` run as well. `vae` defaults to the demo's autoencoder.
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
        captions.unlink()  # training reads the store only


def make(recipe: Recipe, shards: list[int]) -> None:
    """Run the tasks that create, caption and encode a dataset, in this process."""
    init_dataset.run(to_json(recipe))
    caption.run(recipe.data.path, shards)
    latents.run(recipe.data.path, shards)


def relative(path: Path) -> str:
    """Return a path relative to the working directory. Raises ValueError if it is outside."""
    return str(path.relative_to(Path.cwd()))


def write_views(source: Path, target: Path) -> None:
    """Write one to ten crops and mirrored crops of each image, about ROWS in all, to the class folders of `target`."""
    files = sorted(path for path in source.glob("*/*") if path.is_file())
    views_per_image = max(1, ROWS // len(files))
    for path in files:
        folder = target / path.parent.name
        folder.mkdir(exist_ok=True)
        with Image.open(path) as image:
            for number, view in zip(range(views_per_image), views(image.convert("RGB")), strict=False):
                view.save(folder / f"{path.stem}-{number}.png")


def views(image: Image.Image) -> Iterator[Image.Image]:
    """Yield the center crop and the four corner crops of an image, then the mirrored crops."""
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
    """Write MiniLM in float16 with its vocabulary reduced to the tokens of `texts` and the special tokens."""
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
