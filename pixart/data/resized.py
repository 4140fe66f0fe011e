"""The manifest of a dataset that has the rows and captions of another one, and its images at other sizes."""

import dataclasses
from pathlib import Path

from pixart.atomic import copy_atomically
from pixart.config.dataset import DataConfig
from pixart.data.manifest import (
    CONTENTS_FILE,
    FORMAT,
    LISTING_FILE,
    ROW_COUNTS_FILE,
    CaptionsOrigin,
    Manifest,
    latent_buckets,
    model_fingerprint,
)


def make(origin: Manifest, data: DataConfig, patch_size: int) -> Manifest:
    """Build the manifest of a new dataset from that of the dataset whose rows and captions it takes over.

    `data` differs from that of the origin in keys that captions do not depend on, and `patch_size` is that of the model
    that will be trained. The listing of the source is copied, so that rows stay the same and nothing is listed again.
    Raises ValueError, with nothing written, for an image size or aspect bucket that the VAE or the patch does not
    divide, and for a model that does not exist.
    """
    from pixart.data.encoders.text_encoder import text_dim
    from pixart.data.encoders.vae import latent_shape

    manifest = dataclasses.replace(
        origin,
        data=data,
        latent_shape=latent_shape(data.vae, data.image_size),
        buckets=tuple(latent_buckets(data, patch_size)),
        text_dim=text_dim(data.text_encoder),
        models=origin.models | {kind: model_fingerprint(data, kind) for kind in ("vae", "text_encoder")},
        captions_from=CaptionsOrigin(path=origin.data.path, hash=origin.hash),
        format=FORMAT,
    )
    Path(data.path).mkdir(parents=True, exist_ok=True)
    for name in (CONTENTS_FILE, LISTING_FILE, ROW_COUNTS_FILE):
        if (source := Path(origin.data.path) / name).exists():
            copy_atomically(source, Path(data.path) / name)
    return manifest
