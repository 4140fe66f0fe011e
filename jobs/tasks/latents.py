"""The latents job: encode captioned images into the rows of the training arrays, shard by shard."""

import hashlib
import time
from itertools import zip_longest

from jobs.state import ledger
from jobs.tasks.caption import for_each_shard, read_part, take_over
from pixart.config.aspect_buckets import nearest_bucket

BATCH = 32  # images per call of the VAE, and captions per call of the text encoder
MAX_WAITING = 4 * BATCH  # images that wait until there are BATCH of their aspect bucket
FINER = 2  # a JPEG is decoded at a reduced scale that keeps this multiple of the image size


def run(dataset: str, shards: list[int]) -> None:
    """Encode shards one after the other; shards that were encoded from the same captions are skipped.

    Raises ValueError or RuntimeError at the end if a shard failed.
    """
    from pixart.data import manifest as manifests
    from pixart.data.encoders.text_encoder import TextEncoder, Tokenizer, load_tokenizer
    from pixart.data.encoders.vae import load_vae
    from pixart.data.store.zarr_store import create

    manifest = manifests.read(dataset)
    data = manifest.data
    if manifest.captions_from:
        take_over(dataset, shards)
    ledger.captions(dataset, shards)
    complete = ledger.current(dataset, "latents", shards, manifest.hash)
    todo = [shard for shard in shards if shard not in complete]
    if not todo:
        return
    for kind in ("vae", "text_encoder"):
        manifests.check_model(manifest, kind)
    source = manifests.open_images(manifest)
    create(manifest)
    vae = load_vae(data.vae)
    text: Tokenizer = (
        TextEncoder(data.text_encoder, max_tokens=data.max_text_tokens, scale=data.text_scale)
        if data.store_text_embeddings
        else Tokenizer(load_tokenizer(data.text_encoder), max_tokens=data.max_text_tokens)
    )
    for_each_shard(todo, lambda shard: encode_shard(manifest, shard, source, vae, text))


def checksum(columns) -> str:
    """Return the SHA-256 of a shard's arrays, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(columns):
        digest.update(columns[name])
    return digest.hexdigest()


def encode_shard(manifest, shard: int, source, vae, text) -> None:
    """Write the arrays of one shard and its ledger entry.

    Raises ValueError if the source or the captions have changed, or if values do not fit into float16.
    """
    import numpy as np
    import torch

    from pixart.data.store.layout import BUCKET, VALID, latents_of, layout
    from pixart.data.store.zarr_store import write_shard

    begun = time.monotonic()
    captions = ledger.read(manifest.data.path, "caption", shard)
    assert captions is not None  # checked by `run`
    captions_of = {"": "caption", "short_": "short_caption"} if manifest.data.short_captions else {"": "caption"}
    names = ["id", "digest", "label", "valid", "width", "height", *captions_of.values()]
    table = read_part(manifest.data.path, shard).select(names).to_pydict()
    valid = np.array(table["valid"], dtype=bool)
    buckets = nearest_buckets(manifest, table)
    arrays = layout(manifest)
    stored = dict.fromkeys(arrays, np.arange(len(valid)))
    if manifest.buckets:
        stored |= {name: np.flatnonzero(valid & (buckets == index)) for index, name in enumerate(latents_of(manifest))}
    columns = {name: np.zeros((len(stored[name]), *shape), dtype) for name, (shape, dtype) in arrays.items()}
    columns["label"][:] = table["label"]
    columns[VALID][:] = valid
    if manifest.buckets:
        columns[BUCKET][:] = buckets
    for prefix, caption in captions_of.items() if len(valid) else ():
        columns[f"{prefix}token_ids"], columns[f"{prefix}token_mask"] = text.tokenize(table[caption])
    items = source.read(*manifest.shard_range(shard))
    for bucket, rows, latents in encoded(manifest, items, table, buckets, vae):
        name = list(latents_of(manifest))[bucket]
        columns[name][np.searchsorted(stored[name], rows)] = latents
        for prefix in captions_of if manifest.data.store_text_embeddings else ():
            states = text.states(columns[f"{prefix}token_ids"][rows], columns[f"{prefix}token_mask"][rows])
            columns[f"{prefix}text_states"][rows] = states.to(torch.float16).cpu().numpy()
    for name in columns:
        if columns[name].dtype == np.float16 and not np.isfinite(columns[name]).all():
            raise ValueError(f"shard {shard}: {name} exceed the range of float16")

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
            checksum=checksum(columns),
            seconds=time.monotonic() - begun,
            versions={"torch": torch.__version__, "vae": manifest.data.vae},
        ),
    )


def nearest_buckets(manifest, table):
    """Return the index of each row's aspect bucket, int16 (rows,); zeros without buckets and for rejected images."""
    import numpy as np

    shapes = manifest.image_shapes
    nearest = [
        nearest_bucket(width, height, shapes) if valid and manifest.buckets else 0
        for width, height, valid in zip(table["width"], table["height"], table["valid"], strict=True)
    ]
    return np.array(nearest, np.int16)


def encoded(manifest, items, table, buckets, vae):
    """Yield a bucket, row numbers (B,) of it and latents (B, C, h, w) of the valid items, while images are decoded.

    Raises ValueError if the items are not those that the table's captions describe.
    """
    import numpy as np

    from pixart.data.encoders.vae import encode
    from pixart.data.images.screening import decode_downscaled, digest, resize_and_crop
    from pixart.data.prefetch import prefetch_map

    shapes = manifest.image_shapes

    def wanted():
        for row, (item, id) in enumerate(zip_longest(items, table["id"])):
            if item is None or item.id != id:
                raise ValueError(
                    f"row {row} was {id}, now {item and item.id}; the source changed since 'caption', restore it"
                )
            if table["valid"][row]:
                yield row, item

    def prepare(numbered):
        row, item = numbered
        if digest(item.data) != table["digest"][row]:
            raise ValueError(f"{item.id}: the image changed since it was captioned; restore it, or run 'caption' again")
        height, width = shapes[buckets[row]]
        # The scale at which the upright image covers the shape; the file may have its sides exchanged.
        scale = max(height / table["height"][row], width / table["width"][row])
        image, _ = decode_downscaled(item.data, manifest.data.screening, lambda *_: FINER * scale)
        return row, np.asarray(resize_and_crop(image, height, width))

    def encode_batch(bucket, batch):
        rows, images = zip(*batch, strict=True)
        return bucket, list(rows), encode(vae, np.stack(images), manifest.data.pixel_range)

    waiting: dict[int, list] = {}
    for row, image in prefetch_map(prepare, wanted()):
        waiting.setdefault(int(buckets[row]), []).append((row, image))
        bucket = max(waiting, key=lambda bucket: len(waiting[bucket]))
        if len(waiting[bucket]) == BATCH or sum(map(len, waiting.values())) == MAX_WAITING:
            yield encode_batch(bucket, waiting.pop(bucket))
    for bucket, batch in sorted(waiting.items()):
        yield encode_batch(bucket, batch)
