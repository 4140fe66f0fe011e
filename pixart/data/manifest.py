"""The dataset's manifest: what was fixed before its first task ran.

Row r of shard s is source item `s * rows_per_shard + r`, for ever; an item that cannot be used keeps its row.
"""

import dataclasses
import hashlib
import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pixart.config.dataset import DataConfig, data_from_dict, is_url
from pixart.config.renamed_keys import original_data
from pixart.data.sources.base import Source
from pixart.data.sources.open import open_source
from pixart.data.storage import read_object

FORMAT = 3
NAMED_AS_0_1 = 2  # the format whose `data` has the keys of version 0.1
FILE = "manifest.json"
COUNTS = "source-files.json"  # rows of each parquet or tar file of the source
MODELS = ("vae", "text_encoder", "captioner")


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """`data` is the configuration that made it, `images` how many items the source has."""

    data: DataConfig
    images: int
    rows_per_shard: int
    class_names: tuple[str, ...]
    latent_shape: tuple[int, int, int]  # (channels, height, width)
    text_dim: int
    models: dict[str, str]  # fingerprints of the VAE, the text encoder and the captioner
    format: int = FORMAT

    @property
    def rows(self) -> int:
        """Rows of the store: whole shards, of which the last may not be filled."""
        return self.rows_per_shard * self.data.num_shards

    def shard(self, index: int) -> tuple[int, int]:
        """First row and end row of a shard's items. Raises ValueError for a shard that does not exist."""
        if not 0 <= index < self.data.num_shards:
            raise ValueError(f"shard {index}: the dataset {self.data.path} has shards 0 to {self.data.num_shards - 1}")
        start = min(index * self.rows_per_shard, self.images)
        return start, min(start + self.rows_per_shard, self.images)

    @property
    def hash(self) -> str:
        """Identify the dataset by its content, wherever it lies; checkpoints refer to it."""
        values = dataclasses.replace(self, data=dataclasses.replace(self.data, path="")).values()
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def values(self) -> dict[str, Any]:
        """Return what the hash is computed over, under the keys of the manifest's format."""
        values = dataclasses.asdict(self)
        if values.pop("format") == NAMED_AS_0_1:
            values["data"] = original_data(values["data"])
        return values


def open_images(manifest: Manifest) -> Source:
    """The dataset's source. Raises ValueError where it has not as many items as when the dataset was made."""
    data = manifest.data
    source = open_data(data, Path(data.path) / COUNTS)
    if len(source) != manifest.images:
        raise ValueError(
            f"source {data.source!r} has {len(source)} items, but had {manifest.images} when the dataset {data.path} "
            "was made"
        )
    return source


def open_data(data: DataConfig, counts: Path) -> Source:
    return open_source(data.source, images=data.max_images, seed=data.seed, image_size=data.image_size, counts=counts)


def make(data: DataConfig) -> Manifest:
    """Looks at source, VAE and text encoder, and keeps what it finds out of the source's files for the tasks.

    Raises ValueError, with nothing written, for one that is not there.
    """
    from pixart.data.encoders.text_encoder import text_dim
    from pixart.data.encoders.vae import latent_shape

    if not is_url(data.source) and Path(data.source).resolve() in Path(data.path).resolve().parents:
        raise ValueError(f"the dataset {data.path} would lie within its source {data.source}: name another --home")
    with TemporaryDirectory() as folder:
        counts = Path(folder) / COUNTS
        source = open_data(data, counts)
        manifest = Manifest(
            data=data,
            images=len(source),
            rows_per_shard=-(-len(source) // data.num_shards),
            class_names=tuple(source.class_names),
            latent_shape=latent_shape(data.vae, data.image_size),
            text_dim=text_dim(data.text_encoder),
            models={kind: model_fingerprint(data, kind) for kind in MODELS},
        )
        if counts.exists():
            Path(data.path).mkdir(parents=True, exist_ok=True)
            (Path(data.path) / COUNTS).write_bytes(counts.read_bytes())
    return manifest


def model_fingerprint(data: DataConfig, kind: str) -> str:
    from pixart.data.captions.captioner import INSTRUCTION, prompt_hash
    from pixart.data.encoders.fingerprint import fingerprint
    from pixart.data.encoders.text_encoder import encoder_path
    from pixart.data.encoders.vae import vae_path

    if kind == "captioner":
        if data.captioner == "labels":
            return "labels"
        return f"{fingerprint(data.caption_model)}-{prompt_hash(INSTRUCTION)}"
    return fingerprint(vae_path(data.vae) if kind == "vae" else encoder_path(data.text_encoder))


def check_model(manifest: Manifest, kind: str) -> None:
    """Raises ValueError where the name that the dataset has for one of MODELS now means another model."""
    found, fixed = model_fingerprint(manifest.data, kind), manifest.models[kind]
    if found != fixed:
        raise ValueError(
            f"dataset {manifest.data.path}: its {kind.replace('_', ' ')} is no longer the one that it was made with "
            f"(fingerprint {found}, was {fixed})"
        )


def write(manifest: Manifest) -> None:
    """Writes the manifest atomically."""
    path = Path(manifest.data.path) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"format": manifest.format, "hash": manifest.hash, **manifest.values()}
    temporary = path.with_name(f".{FILE}.{uuid.uuid4().hex[:8]}")
    with temporary.open("w") as file:
        json.dump(record, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read(path: str | Path) -> Manifest:
    """The manifest of a dataset's directory or URL. Raises ValueError where there is none, or it was changed."""
    try:
        record: dict[str, Any] = json.loads(read_object(str(path), FILE) or b"")
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no dataset: it has no readable {FILE}") from error
    if record.get("format") not in (NAMED_AS_0_1, FORMAT):
        raise ValueError(f"{path} has dataset format {record.get('format')!r}, not {NAMED_AS_0_1} or {FORMAT}")
    try:
        manifest = Manifest(
            data=data_from_dict({**record["data"], "path": str(path)}),
            images=record["images"],
            rows_per_shard=record["rows_per_shard"],
            class_names=tuple(record["class_names"]),
            latent_shape=tuple(record["latent_shape"]),
            text_dim=record["text_dim"],
            models=record["models"],
            format=record["format"],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}/{FILE} is no manifest of this suite: {error}") from error
    if manifest.hash != record.get("hash"):
        raise ValueError(f"{path}/{FILE} was changed since the dataset was made: its hash is {manifest.hash}")
    return manifest
