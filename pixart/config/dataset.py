"""Configuration of a dataset: its source, its models, and the limits of its screening and audit."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from pixart.config.aspect_buckets import Shape, bucket_shapes
from pixart.config.captions import CaptionsConfig
from pixart.config.limits import require_at_least, require_fraction
from pixart.config.renamed_keys import rename_data

PIXEL_RANGES = ((-1, 1), (0, 1))
# Keys that rows, screening and captions do not depend on: datasets with the same captions may differ in them.
KEYS_BESIDE_CAPTIONS = (
    "path",
    "image_size",
    "aspect_buckets",
    "vae",
    "pixel_range",
    "normalization",
    "text_encoder",
    "max_text_tokens",
    "text_scale",
    "store_text_embeddings",
    "short_captions",
)
MAX_SHARDS = 1_000_000  # each shard is a file or two in one folder


@dataclass(frozen=True, kw_only=True, slots=True)
class ScreeningConfig:
    """Limits that `pixart.data.images.screening` checks each image against, before any GPU time is spent.

    Raises ValueError naming the field for a limit that no image, or every image, could meet.
    """

    max_pixels: int = 50_000_000
    """Largest width times height, in pixels, according to the file's header."""

    min_side: int = 64
    """Smallest shorter side, in pixels."""

    max_aspect: float = 4.0
    """Largest ratio of the longer side to the shorter side."""

    solid_color_fraction: float = 0.999
    """Fraction of the pixels in one colour from which an image is rejected as plain."""

    uniform_area_fraction: float = 0.995
    """Fraction of the inner area that is flat and of one tone from which an image is rejected as near-plain."""

    def __post_init__(self) -> None:
        require_at_least(1, max_pixels=self.max_pixels, min_side=self.min_side, max_aspect=self.max_aspect)
        fractions = {
            "solid_color_fraction": self.solid_color_fraction,
            "uniform_area_fraction": self.uniform_area_fraction,
        }
        for name, value in fractions.items():
            if not 0 < value <= 1:
                raise ValueError(f"{name}={value}: must be more than 0 and at most 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnsConfig:
    """Names of columns of a parquet source or of metadata files, and of keys of JSON files beside images."""

    image: str | None = None
    """Column of the images: binary, a struct of bytes and path, or paths; none tries image, jpg and others."""

    caption: str | None = None
    """Column of the captions; none takes the first of text, caption and others that is not empty."""

    label: str | None = None
    """Column of the class: integers, or words, which are numbered in order; none tries label and others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Source, preprocessing and models of a dataset; all but `path` are fixed in its manifest before the first task.

    Raises ValueError naming the field for a value out of range.
    """

    path: str
    """Directory or URL of the dataset."""

    source: str = "demo"
    """Source of the images: `demo` for rendered scenes, or a path or fsspec URL of an image folder, of parquet files or
    of webdataset tars."""

    num_shards: int = 256
    """Number of shards; one array element processes one shard."""

    max_images: int | None = None
    """Number of images taken from the source; none takes all of them."""

    columns: ColumnsConfig = field(default_factory=ColumnsConfig)

    seed: int = 0
    """Random seed of the rendered scenes of the source `demo`, and of the choice of one caption where a source has
    several for an image."""

    image_size: int = 256
    """Side of the training images, in pixels, after resize and centre crop."""

    aspect_buckets: str | None = None
    """Shapes of the training images, each image being cropped to the nearest one: `pixart` for PixArt-alpha's 40 of the
    area of image_size, `STEP:RATIO` for all multiples of STEP pixels of that area up to a ratio of the sides, such as
    32:2, or a list such as 256x256,320x192 of widths and heights; none crops every image to the square."""

    vae: str = "demo"
    """VAE that encodes the images: `demo`, or a folder or hub name of a diffusers AutoencoderKL."""

    pixel_range: tuple[int, int] = (-1, 1)
    """Range of the pixel values that the VAE encodes: -1,1, which published VAEs were trained with, or 0,1."""

    normalization: Literal["channel", "scalar"] = "channel"
    """Normalization of latents: `channel` by the mean and standard deviation of each channel, `scalar` by those of all
    channels together."""

    text_encoder: str = "minilm"
    """Text encoder of the captions: `minilm`, or a folder or hub name of a transformers encoder."""

    max_text_tokens: int = 120
    """Number of tokens that a caption is truncated or padded to."""

    text_scale: float = 1.0
    """Factor that the text encoder's embeddings are multiplied by."""

    store_text_embeddings: bool = False
    """Whether to store text embeddings with the dataset; at a width of 2048 they take 15 times the space of the
    latents. Otherwise training runs the text encoder."""

    short_captions: bool = False
    """Whether to store the tokens (and embeddings) of the captions' first sentences too; see
    stage2.short_caption_prob."""

    captioner: Literal["labels", "vllm", "adopted"] = "labels"
    """Origin of the captions: `labels` takes the source's own text, `vllm` generates them with `caption_model`;
    `adopted` is that of the datasets which the command `adopt` makes from precomputed latents and captions."""

    caption_model: str = "Qwen/Qwen3-VL-2B-Instruct"
    """Folder or hub name of the vision-language model that the captioner `vllm` runs."""

    captions: CaptionsConfig = field(default_factory=CaptionsConfig)

    screening: ScreeningConfig = field(default_factory=ScreeningConfig)

    def __post_init__(self) -> None:
        require_at_least(
            1, num_shards=self.num_shards, image_size=self.image_size, max_text_tokens=self.max_text_tokens
        )
        if self.max_images is not None:
            require_at_least(1, max_images=self.max_images)
        require_at_least(0, seed=self.seed, text_scale=self.text_scale)
        bucket_shapes(self.aspect_buckets, self.image_size)
        if self.pixel_range not in PIXEL_RANGES:
            raise ValueError(f"pixel_range={self.pixel_range}: must be -1,1 or 0,1")
        if self.num_shards > MAX_SHARDS:
            raise ValueError(f"num_shards={self.num_shards}: must be at most {MAX_SHARDS}")

    @property
    def image_shapes(self) -> tuple[Shape, ...]:
        """Shapes (height, width) of the training images in pixels: one per aspect bucket, or the only one."""
        return bucket_shapes(self.aspect_buckets, self.image_size) or ((self.image_size, self.image_size),)


def check_shared_captions(origin: DataConfig, data: DataConfig) -> None:
    """Check that a dataset can have the rows and captions of another one. Raises ValueError naming the key if not."""
    names = [item.name for item in fields(DataConfig) if item.name not in KEYS_BESIDE_CAPTIONS]
    if origin.source == "demo":
        names.append("image_size")  # at which the scenes are rendered
    for name in names:
        value, expected = getattr(data, name), getattr(origin, name)
        if value != expected:
            raise ValueError(
                f"data.{name}={value!r}: the dataset {origin.path}, whose captions are taken over, has {expected!r}; "
                "leave the key out, or run 'caption' for a dataset with captions of its own"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditConfig:
    """Limits that a dataset must meet to pass its audit; training requires a passed audit.

    Raises ValueError naming the field for a limit that is not a fraction.
    """

    max_rejected: float = 0.2
    """Largest fraction of all rows that may be rejected, for any reason."""

    max_plain: float = 0.02
    """Largest fraction of all rows that may be rejected as plain or near-plain."""

    max_duplicates: float = 0.05
    """Largest fraction of the valid rows that may be exact or near duplicates; the first image of each group is not
    counted."""

    max_same_opening: float = 0.5
    """Largest fraction of the valid rows whose captions may begin with the same three words."""

    max_empty_captions: float = 0.5
    """Largest fraction of the valid rows that may have no caption; a dataset without any caption is one of classes, and
    passes."""

    def __post_init__(self) -> None:
        require_fraction(
            max_rejected=self.max_rejected,
            max_plain=self.max_plain,
            max_empty_captions=self.max_empty_captions,
            max_duplicates=self.max_duplicates,
            max_same_opening=self.max_same_opening,
        )


def is_url(path: str) -> bool:
    """Return whether a path is a URL, such as `s3://bucket/data`."""
    return "://" in path


def data_from_dict(values: Mapping[str, Any]) -> DataConfig:
    """Build the configuration of a dataset from a manifest's or a run's record of it, also one by version 0.1.

    A record without `captions` was made by the default instructions and sampling, which were constants before.
    Raises TypeError or KeyError for a record with other fields, and ValueError for a value out of range.
    """
    values = rename_data(values)
    if "pixel_range" in values:
        values["pixel_range"] = tuple(values["pixel_range"])
    sections = {
        "columns": ColumnsConfig(**values.get("columns", {})),
        "captions": CaptionsConfig(**values.get("captions", {})),
        "screening": ScreeningConfig(**values["screening"]),
    }
    return DataConfig(**{**values, **sections})
