"""The dataset manifest: everything that is fixed before the first task of a dataset runs.

Row r of shard s is always source item `s * rows_per_shard + r`; an item that is rejected keeps its row. The shards of
an adopted dataset are files of different lengths: row r of shard s is row r of file s, `rows_per_shard` is the length
of the longest file, and the rows of the store behind the end of a shorter one are padding, which is never valid.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from pixart import records
from pixart.atomic import copy_atomically, write_atomically
from pixart.config.aspect_buckets import bucket_shapes
from pixart.config.dataset import ColumnsConfig, DataConfig, data_from_dict, is_url
from pixart.config.renamed_keys import original_data
from pixart.data.listing.blocks import open_reader
from pixart.data.sources.base import Source
from pixart.data.sources.open import open_source
from pixart.data.storage import read_file
from pixart.records import Count

FORMAT = 4
LEGACY_FORMAT = 2  # the format of version 0.1, whose `data` has other keys
FORMATS = (LEGACY_FORMAT, 3, FORMAT)  # that can be read
ADDED_KEYS = {"pixel_range": 4, "captions": 4, "columns": 4}  # keys of `data`, by the first format that records them
FILE = "manifest.json"
CONTENTS_FILE = "source.json"  # counts of what was taken from the source and left out
LISTING_FILE = "source-listing.bin"  # the files of the source, or its images in their order; see `listing.blocks`
ROW_COUNTS_FILE = "source-files.json"  # number of rows of each parquet or tar file of the source
MODELS = ("vae", "text_encoder", "captioner")
ADOPTED = "adopted"  # captioner of a dataset whose captions and latents were computed elsewhere

Form = Literal["labels", "captions", "tokens", "texts"]  # what the shards of an adopted dataset hold beside latents


@dataclass(frozen=True, kw_only=True, slots=True)
class Adoption:
    """The shards that a dataset was adopted from: one file each, of different lengths."""

    form: Form
    shard_rows: tuple[Count, ...]  # rows of each file


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionsOrigin:
    """The dataset whose captions another one has, with the same rows and images of another size."""

    path: str  # when the captions were taken over
    hash: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The fixed properties of a dataset.

    `data` is the configuration that the dataset was created from, and `images` is the number of source items.
    """

    data: DataConfig
    images: Count
    rows_per_shard: Count
    class_names: tuple[str, ...]
    latent_shape: tuple[Count, Count, Count]  # (channels, height, width) of an image of `data.image_size` squared
    text_dim: Count
    models: dict[str, str]  # fingerprints of the VAE, the text encoder and the captioner
    buckets: tuple[tuple[Count, Count], ...] = ()  # (height, width) of the latents of each aspect bucket; () has none
    adopted: Adoption | None = None  # None for a dataset of images
    listing: str | None = None  # checksum of LISTING_FILE; None for the demo and for datasets from before it
    captions_from: CaptionsOrigin | None = None  # None for a dataset whose images were captioned for it
    format: int = FORMAT

    @property
    def rows(self) -> int:
        """Number of rows of the store, padding included. Every shard has `rows_per_shard` rows."""
        return self.rows_per_shard * self.data.num_shards

    def shard_range(self, shard: int) -> tuple[int, int]:
        """Return the first row of a shard and the row after its last source item.

        Raises ValueError if the shard does not exist.
        """
        if not 0 <= shard < self.data.num_shards:
            raise ValueError(
                f"shard {shard} does not exist; the dataset {self.data.path} has shards 0 to {self.data.num_shards - 1}"
            )
        if self.adopted:
            start = shard * self.rows_per_shard
            return start, start + self.adopted.shard_rows[shard]
        start = min(shard * self.rows_per_shard, self.images)
        return start, min(start + self.rows_per_shard, self.images)

    @property
    def latent_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Shapes (channels, height, width) of the latents: one per aspect bucket, or the only one."""
        return tuple((self.latent_shape[0], *bucket) for bucket in self.buckets) or (self.latent_shape,)

    @property
    def image_shapes(self) -> tuple[tuple[int, int], ...]:
        """Shapes (height, width) of the training images in pixels: one per aspect bucket, or the only one."""
        return self.data.image_shapes

    @property
    def downsampling_factor(self) -> int:
        """Side of the image area that one latent pixel stands for, in pixels."""
        return self.data.image_size // self.latent_shape[1]

    @property
    def hash(self) -> str:
        """Sixteen hexadecimal digits that identify the dataset independently of its path; checkpoints refer to it."""
        origin = self.captions_from and dataclasses.replace(self.captions_from, path="")
        values = dataclasses.replace(self, data=dataclasses.replace(self.data, path=""), captions_from=origin).values()
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]

    def values(self) -> dict[str, Any]:
        """Return the manifest as JSON values, with the keys of its format."""
        values = dataclasses.asdict(self)
        version = values.pop("format")
        for key in ("adopted", "listing", "captions_from"):
            if values[key] is None:
                del values[key]
        values["data"] = {key: value for key, value in values["data"].items() if ADDED_KEYS.get(key, 0) <= version}
        # Values from before a key existed are left out, so that older datasets keep their hash.
        if self.data.columns == ColumnsConfig():
            values["data"].pop("columns", None)
        if not self.buckets:
            del values["data"]["aspect_buckets"], values["buckets"]
        if version == LEGACY_FORMAT:
            values["data"] = original_data(values["data"])
        return values


def open_images(manifest: Manifest) -> Source:
    """Open the image source of a dataset.

    Raises ValueError if its number of items has changed since the dataset was created.
    """
    data = manifest.data
    if manifest.adopted:
        raise ValueError(f"dataset {data.path} was adopted: it has latents and captions, and no images")
    listing = Path(data.path) / LISTING_FILE if manifest.listing else None
    if listing and open_reader(listing).checksum != manifest.listing:
        raise ValueError(f"{listing}: is not the listing that the dataset was created with; restore it")
    source = open_configured_source(data, Path(data.path) / ROW_COUNTS_FILE, listing)
    if len(source) != manifest.images:
        raise ValueError(
            f"source {data.source!r} has {len(source)} items, but had {manifest.images} when the dataset {data.path} "
            "was created; restore the source or create another dataset"
        )
    return source


def open_configured_source(data: DataConfig, counts_file: Path, listing_file: Path | None) -> Source:
    """Open the image source that a configuration names."""
    return open_source(
        data.source,
        max_images=data.max_images,
        seed=data.seed,
        image_size=data.image_size,
        counts_file=counts_file,
        listing_file=listing_file,
        columns=data.columns,
    )


def make(data: DataConfig, patch_size: int = 1) -> Manifest:
    """Build the manifest of a new dataset from its source, VAE and text encoder.

    `patch_size` is that of the model that will be trained on it, which must divide the latents of every aspect bucket.

    Also writes into the dataset's directory the source's files and their row counts, so that tasks need not list them
    again, and what the source holds and leaves out. Raises ValueError, with nothing written, if the source or a model
    does not exist, or if the VAE or the patch does not divide an aspect bucket.
    """
    from pixart.data.encoders.text_encoder import text_dim
    from pixart.data.encoders.vae import latent_shape

    if data.captioner == ADOPTED:
        raise ValueError("data.captioner=adopted: is the captioner of datasets that 'adopt' creates; run 'adopt'")
    if not is_url(data.source) and Path(data.source).resolve() in Path(data.path).resolve().parents:
        raise ValueError(f"the dataset {data.path} would be inside its own source {data.source}; choose another --home")
    with TemporaryDirectory() as folder:
        listing = Path(folder) / LISTING_FILE
        source = open_configured_source(data, Path(folder) / ROW_COUNTS_FILE, listing)
        manifest = Manifest(
            data=data,
            images=len(source),
            rows_per_shard=-(-len(source) // data.num_shards),
            class_names=tuple(source.class_names),
            latent_shape=latent_shape(data.vae, data.image_size),
            buckets=tuple(latent_buckets(data, patch_size)),
            text_dim=text_dim(data.text_encoder),
            models={kind: model_fingerprint(data, kind) for kind in MODELS},
            listing=open_reader(listing).checksum if listing.exists() else None,
        )
        write_atomically(Path(folder) / CONTENTS_FILE, json.dumps(source.contents().record(), indent=2))
        Path(data.path).mkdir(parents=True, exist_ok=True)
        for path in Path(folder).iterdir():
            copy_atomically(path, Path(data.path) / path.name)
    return manifest


def latent_buckets(data: DataConfig, patch_size: int) -> Iterator[tuple[int, int]]:
    """Yield the (height, width) of the latents of each aspect bucket of a configuration.

    Raises ValueError for a bucket that the VAE cannot encode, or whose latents have sides that the patch does not
    divide.
    """
    from pixart.data.encoders.vae import downsampling_factor

    factor = downsampling_factor(data.vae)
    for height, width in bucket_shapes(data.aspect_buckets, data.image_size):
        bucket = f"data.aspect_buckets={data.aspect_buckets}: {width}x{height}"
        if height % factor or width % factor:
            raise ValueError(f"{bucket} must have sides that are multiples of {factor}, the VAE's downsampling factor")
        if height // factor % patch_size or width // factor % patch_size:
            raise ValueError(
                f"{bucket} must have sides that are multiples of {factor * patch_size}, the VAE's downsampling factor "
                f"times model.patch_size={patch_size}"
            )
        yield height // factor, width // factor


def model_fingerprint(data: DataConfig, kind: str) -> str:
    """Return the fingerprint of one of MODELS; the captioner's ends with the hash of its image instruction."""
    from pixart.data.captions.captioner import prompt_hash
    from pixart.data.encoders.fingerprint import fingerprint
    from pixart.data.encoders.text_encoder import encoder_path
    from pixart.data.encoders.vae import vae_path

    if kind == "captioner":
        if data.captioner != "vllm":
            return data.captioner
        return f"{fingerprint(data.caption_model)}-{prompt_hash(data.captions.image_instruction)}"
    return fingerprint(vae_path(data.vae) if kind == "vae" else encoder_path(data.text_encoder))


def check_model(manifest: Manifest, kind: str) -> None:
    """Check that one of MODELS is still the model that the dataset was created with.

    Raises ValueError if its name now refers to other files.
    """
    actual, expected = model_fingerprint(manifest.data, kind), manifest.models[kind]
    if actual != expected:
        raise ValueError(
            f"dataset {manifest.data.path}: its {kind.replace('_', ' ')} has changed since the dataset was created "
            f"(fingerprint {actual}, was {expected}); restore the model or create another dataset"
        )


def write(manifest: Manifest) -> None:
    """Write the manifest atomically into the dataset's directory."""
    record = {"format": manifest.format, "hash": manifest.hash, **manifest.values()}
    write_atomically(Path(manifest.data.path) / FILE, json.dumps(record, indent=2))


def read(path: str | Path) -> Manifest:
    """Read the manifest of a dataset by its directory or URL.

    Raises ValueError if there is no manifest, if its format is unknown or if it was edited.
    """
    try:
        text = read_file(str(path), FILE)
    except OSError as error:
        raise ValueError(f"{path} is not a dataset; it has no readable {FILE}") from error
    if text is None:
        raise ValueError(f"{path} is not a dataset; it has no readable {FILE}")
    record = records.parse(text, dict[str, Any], f"{path}/{FILE}")
    if record.get("format") not in FORMATS:
        supported = f"{', '.join(map(str, FORMATS[:-1]))} and {FORMATS[-1]}"
        raise ValueError(f"{path}/{FILE} has format {record.get('format')!r}; supported are {supported}")
    try:
        data = data_from_dict({**record["data"], "path": str(path)})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}/{FILE}: is not a dataset manifest, {error}; restore it") from None
    values = {key: value for key, value in record.items() if key != "hash"}
    manifest: Manifest = records.convert({**values, "data": data}, Manifest, f"{path}/{FILE}")
    if manifest.hash != record.get("hash"):
        raise ValueError(f"{path}/{FILE} was edited after the dataset was created; its hash is now {manifest.hash}")
    return manifest
