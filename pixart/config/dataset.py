"""What fixes a dataset: its source, its models and the limits of screening."""

from dataclasses import dataclass, field
from typing import Any, Literal

from pixart.config.limits import require_at_least
from pixart.config.renamed_keys import rename_data

MOST_SHARDS = 1_000_000  # each is a file or two of one folder


@dataclass(frozen=True, kw_only=True, slots=True)
class ScreeningConfig:
    """Which images are kept: the limits that `pixart.data.images.screening` holds each image against.

    Raises ValueError naming the field for a limit that no image, or every image, could meet.
    """

    max_pixels: int = 50_000_000  # width times height, by the file's header
    min_side: int = 64  # pixels of the shorter side
    max_aspect: float = 4.0  # longer side over shorter side
    solid_color_fraction: float = 0.999  # share of the picture in one colour from which on it is plain
    uniform_area_fraction: float = (
        0.995  # share of its inside that is flat and of one tone, from which on it is near-plain
    )

    def __post_init__(self) -> None:
        require_at_least(1, max_pixels=self.max_pixels, min_side=self.min_side, max_aspect=self.max_aspect)
        for name in ("solid_color_fraction", "uniform_area_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be more than 0 and at most 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """A dataset: where its images come from and how they become rows.

    `source` is `demo` or the fsspec URL of an image folder, parquet files or webdataset tars.
    All of it but `path` is fixed in the dataset's manifest before the first task runs.
    """

    path: str  # the dataset's directory
    source: str = "demo"
    num_shards: int = 256
    max_images: int | None = None  # how many of the source's images; None: all of them
    seed: int = 0  # of the demo's scenes
    image_size: int = 256  # pixels, both sides, after resize and centre crop
    vae: str = "demo"  # `demo`, or a folder or hub name of a diffusers AutoencoderKL
    normalization: Literal["channel", "scalar"] = "channel"  # of latents: each channel's mean and deviation, or one
    text_encoder: str = "minilm"  # `minilm`, or a folder or hub name of a transformers encoder
    max_text_tokens: int = 120
    text_scale: float = 1.0  # multiplies the encoder's states
    store_text_embeddings: bool = False  # store the states too: 15 times the size of the latents at width 2048
    short_captions: bool = False  # store the tokens (and states) of short captions too
    captioner: Literal["labels", "vllm"] = "labels"
    caption_model: str = "Qwen/Qwen3-VL-2B-Instruct"  # read by the vllm captioner
    screening: ScreeningConfig = field(default_factory=ScreeningConfig)

    def __post_init__(self) -> None:
        require_at_least(
            1, num_shards=self.num_shards, image_size=self.image_size, max_text_tokens=self.max_text_tokens
        )
        require_at_least(1, max_images=1 if self.max_images is None else self.max_images)
        require_at_least(0, seed=self.seed, text_scale=self.text_scale)
        if self.num_shards > MOST_SHARDS:
            raise ValueError(f"num_shards={self.num_shards}: must be at most {MOST_SHARDS}")


def is_url(path: str) -> bool:
    """Whether a dataset's path means one that lies elsewhere."""
    return "://" in path


def read_data(values: dict[str, Any]) -> DataConfig:
    """Rebuilds the dataset's part from its dictionary, as JSON holds it; unknown fields raise TypeError."""
    values = rename_data(values)
    return DataConfig(**{**values, "screening": ScreeningConfig(**values["screening"])})
