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
from typing import Any

from pixart.config import DataConfig
from pixart.data.objects import read_object
from pixart.data.sources import Source, open_source

FORMAT = 2
FILE = "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """`data` is the configuration that made it, `images` how many items the source has."""

    data: DataConfig
    images: int
    rows_per_shard: int
    class_names: tuple[str, ...]
    latent_shape: tuple[int, int, int]  # (channels, height, width)
    text_dim: int

    @property
    def rows(self) -> int:
        """Rows of the store: whole shards, of which the last may not be filled."""
        return self.rows_per_shard * self.data.shards

    def shard(self, index: int) -> tuple[int, int]:
        """First row and end row of a shard's items. Raises ValueError for a shard that does not exist."""
        if not 0 <= index < self.data.shards:
            raise ValueError(f"shard {index}: the dataset {self.data.path} has shards 0 to {self.data.shards - 1}")
        start = min(index * self.rows_per_shard, self.images)
        return start, min(start + self.rows_per_shard, self.images)

    @property
    def hash(self) -> str:
        """Identifies the dataset wherever it lies."""
        values = dataclasses.asdict(dataclasses.replace(self, data=dataclasses.replace(self.data, path="")))
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def open_images(manifest: Manifest) -> Source:
    """The dataset's source; what it finds out of its files is kept beside the manifest."""
    data = manifest.data
    counts = Path(data.path) / "source-files.json"
    return open_source(data.source, images=data.images, seed=data.seed, image_size=data.image_size, counts=counts)


def make(data: DataConfig) -> Manifest:
    """Looks at source, VAE and text encoder. Raises ValueError for one that is not there."""
    from pixart.data.text import text_dim
    from pixart.data.vae import latent_shape

    source = open_source(data.source, images=data.images, seed=data.seed, image_size=data.image_size)
    return Manifest(
        data=data,
        images=len(source),
        rows_per_shard=-(-len(source) // data.shards),
        class_names=tuple(source.class_names),
        latent_shape=latent_shape(data.vae, data.image_size),
        text_dim=text_dim(data.text_encoder),
    )


def write(manifest: Manifest) -> None:
    """Writes the manifest atomically."""
    path = Path(manifest.data.path) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"format": FORMAT, "hash": manifest.hash, **dataclasses.asdict(manifest)}
    temporary = path.with_name(f".{FILE}.{uuid.uuid4().hex[:8]}")
    with temporary.open("w") as file:
        json.dump(record, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read(path: str | Path) -> Manifest:
    """The manifest of a dataset's directory or URL. Raises ValueError where there is none."""
    try:
        text = read_object(str(path), FILE)
        record: dict[str, Any] = json.loads(text or b"")
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no dataset: it has no readable {FILE}") from error
    if record["format"] != FORMAT:
        raise ValueError(f"{path} has dataset format {record['format']!r}, not {FORMAT}")
    return Manifest(
        data=DataConfig(**{**record["data"], "path": str(path)}),
        images=record["images"],
        rows_per_shard=record["rows_per_shard"],
        class_names=tuple(record["class_names"]),
        latent_shape=tuple(record["latent_shape"]),
        text_dim=record["text_dim"],
    )
