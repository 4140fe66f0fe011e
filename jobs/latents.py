"""The latents job: one shard of captioned images to that shard's rows of the training set."""

import hashlib
import time

from jobs import ledger
from jobs.caption import for_each_shard, part_path

BATCH = 32  # images that the VAE and captions that the text encoder are given at a time


def run(dataset: str, shards: list[int]) -> None:
    """Encodes shards one after the other; those that the ledger has, made from the same captions, are left alone."""

    from pixart.data import manifest as manifests
    from pixart.data.text import TextEncoder
    from pixart.data.vae import load_vae

    manifest = manifests.read(dataset)
    data = manifest.data
    todo = [shard for shard in shards if not complete(dataset, manifest.hash, shard)]
    if not todo:
        return
    source = manifests.open_images(manifest)
    vae = load_vae(data.vae)
    text = TextEncoder(data.text_encoder, tokens=data.text_tokens, scale=data.text_scale)
    for_each_shard(todo, lambda shard: encode_shard(manifest, shard, source, vae, text))


def complete(dataset: str, manifest_hash: str, shard: int) -> bool:
    captions, latents = (ledger.read(dataset, job, shard) for job in ("caption", "latents"))
    if captions is None:
        raise ValueError(f"shard {shard} has no captions yet: run the caption job first")
    return latents is not None and latents.manifest == manifest_hash and latents.inputs == captions.checksum


def encode_shard(manifest, shard: int, source, vae, text) -> None:
    import numpy as np
    import pyarrow.parquet as pq
    import torch

    from pixart.data.screening import decode, resize_and_crop
    from pixart.data.store import layout, write_shard
    from pixart.data.vae import encode

    begun = time.monotonic()
    captions = ledger.read(manifest.data.path, "caption", shard)
    assert captions is not None  # `complete` has looked
    part = part_path(manifest.data.path, shard).read_bytes()
    if hashlib.sha256(part).hexdigest() != captions.checksum:
        raise ValueError(f"shard {shard}: its captions are not those of the ledger, caption it again")
    table = pq.read_table(part_path(manifest.data.path, shard)).to_pydict()
    valid = np.array(table["valid"], dtype=bool)
    columns = {name: np.zeros((len(valid), *shape), dtype) for name, (shape, dtype) in layout(manifest).items()}
    columns["label"][:] = table["label"]
    columns["valid"][:] = valid
    captions_of = {"": "caption", "short_": "short_caption"} if manifest.data.short_captions else {"": "caption"}
    for prefix, caption in captions_of.items():
        if len(valid):
            columns[f"{prefix}token_ids"], columns[f"{prefix}token_mask"] = text.tokenize(table[caption])

    start, stop = manifest.shard(shard)
    rows: list[int] = []
    images: list = []
    for row, item in enumerate(source.read(start, stop)):
        if valid[row]:
            rows.append(row)
            images.append(np.asarray(resize_and_crop(decode(item.data), manifest.data.image_size)))
        if rows and (len(rows) == BATCH or row == stop - start - 1):
            columns["latents"][rows] = encode(vae, np.stack(images))
            for prefix in captions_of if manifest.data.text_states else ():
                states = text.states(columns[f"{prefix}token_ids"][rows], columns[f"{prefix}token_mask"][rows])
                columns[f"{prefix}text_states"][rows] = states.to(torch.float16).cpu().numpy()
            rows, images = [], []
    for name in columns:
        if columns[name].dtype == np.float16 and not np.isfinite(columns[name]).all():
            raise ValueError(f"shard {shard}: {name} do not fit into float16")

    write_shard(manifest, shard, columns)
    ledger.record(
        manifest.data.path,
        "latents",
        shard,
        ledger.Entry(
            manifest=manifest.hash,
            inputs=captions.checksum,
            rows=len(valid),
            valid=int(valid.sum()),
            checksum=hashlib.sha256(columns["latents"].tobytes()).hexdigest(),
            seconds=time.monotonic() - begun,
            versions={"torch": torch.__version__, "vae": manifest.data.vae},
        ),
    )
