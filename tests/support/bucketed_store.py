"""Stores of random latents in aspect buckets."""

from collections.abc import Sequence

import numpy as np

from pixart.config.dataset import DataConfig
from pixart.data import manifest as manifests
from pixart.data.manifest import Manifest
from pixart.data.store import zarr_store as stores
from pixart.data.store.layout import BUCKET, VALID, latents_of
from pixart.data.store.zarr_store import Store

Buckets = Sequence[tuple[int, int]]
CHANNELS = 2


def bucketed_manifest(path: str, buckets: Buckets, *, rows: int, num_shards: int) -> Manifest:
    """Create the empty arrays of a dataset with aspect buckets of latents (height, width); () has none."""
    shapes = ",".join(f"{8 * width}x{8 * height}" for height, width in buckets) or None
    data = DataConfig(path=path, num_shards=num_shards, max_images=rows, max_text_tokens=4, aspect_buckets=shapes)
    manifest = Manifest(
        data=data,
        images=rows,
        rows_per_shard=-(-rows // num_shards),
        class_names=("a",),
        latent_shape=(CHANNELS, 4, 4),
        buckets=tuple(buckets),
        text_dim=6,
        models={},
    )
    stores.create(manifest)
    manifests.write(manifest)
    return manifest


def bucketed_columns(manifest: Manifest, shard: int, bucket: np.ndarray, valid: np.ndarray) -> dict[str, np.ndarray]:
    """Return the columns of a shard whose rows have these buckets; all values of a row are its index in the dataset."""
    rows = np.arange(*manifest.shard_range(shard))
    stored = {
        name: valid & (bucket == index) if manifest.buckets else np.ones(len(rows), bool)
        for index, name in enumerate(latents_of(manifest))
    }
    columns = {}
    for name, (shape, dtype) in stores.layout(manifest).items():
        kept = rows[stored[name]] if name in stored else rows
        columns[name] = np.broadcast_to(kept.reshape(-1, *[1] * len(shape)), (len(kept), *shape)).astype(dtype)
    return columns | ({BUCKET: bucket.astype(np.int16)} if manifest.buckets else {}) | {VALID: valid}


def bucketed_store(
    path: str, buckets: Buckets, *, rows: int, num_shards: int, seed: int = 0, invalid: float = 0.1
) -> Store:
    """Return a store whose rows are of random buckets, in random proportions, and of which a fraction is invalid."""
    random = np.random.default_rng(seed)
    manifest = bucketed_manifest(path, buckets, rows=rows, num_shards=num_shards)
    shares = random.dirichlet(np.ones(max(1, len(buckets))))
    for shard in range(num_shards):
        start, stop = manifest.shard_range(shard)
        bucket = random.choice(len(shares), size=stop - start, p=shares)
        valid = random.random(stop - start) >= invalid
        stores.write_shard(manifest, shard, bucketed_columns(manifest, shard, bucket, valid))
    return Store(manifest)
