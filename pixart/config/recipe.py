"""Configuration: what a recipe says, and how the command line changes it.

Imports neither torch nor anything heavy, so that the launcher may read it.
"""

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

MOST_SHARDS = 1_000_000  # each is a file or two of one folder


@dataclass(frozen=True, kw_only=True, slots=True)
class ScreeningConfig:
    """Which images are kept: the limits that `pixart.data.images.screening` holds each image against.

    Raises ValueError naming the field for a limit that no image, or every image, could meet.
    """

    max_pixels: int = 50_000_000  # width times height, by the file's header
    min_side: int = 64  # pixels of the shorter side
    max_aspect: float = 4.0  # longer side over shorter side
    plain: float = 0.999  # share of the picture in one colour from which on it is plain
    near_plain: float = 0.995  # share of its inside that is flat and of one tone, from which on it is near-plain

    def __post_init__(self) -> None:
        require_at_least(1, max_pixels=self.max_pixels, min_side=self.min_side, max_aspect=self.max_aspect)
        for name in ("plain", "near_plain"):
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
    shards: int = 256
    images: int | None = None  # how many of the source's images; None: all of them
    seed: int = 0  # of the demo's scenes
    image_size: int = 256  # pixels, both sides, after resize and centre crop
    vae: str = "demo"  # `demo`, or a folder or hub name of a diffusers AutoencoderKL
    normalization: Literal["channel", "scalar"] = "channel"  # of latents: each channel's mean and deviation, or one
    text_encoder: str = "minilm"  # `minilm`, or a folder or hub name of a transformers encoder
    text_tokens: int = 120
    text_scale: float = 1.0  # multiplies the encoder's states
    text_states: bool = False  # store the states too: 15 times the size of the latents at width 2048
    short_captions: bool = False  # store the tokens (and states) of short captions too
    captioner: Literal["labels", "vllm"] = "labels"
    caption_model: str = "Qwen/Qwen3-VL-2B-Instruct"  # read by the vllm captioner
    screening: ScreeningConfig = field(default_factory=ScreeningConfig)

    def __post_init__(self) -> None:
        require_at_least(1, shards=self.shards, image_size=self.image_size, text_tokens=self.text_tokens)
        require_at_least(1, images=1 if self.images is None else self.images)
        require_at_least(0, seed=self.seed, text_scale=self.text_scale)
        if self.shards > MOST_SHARDS:
            raise ValueError(f"shards={self.shards}: must be at most {MOST_SHARDS}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Sizes that stage 1 and stage 2 share; defaults are the real run's (PixArt-alpha XL/2)."""

    in_dim: int = 16  # latent channels
    dim: int = 1152
    cond_dim: int = 256
    num_heads: int = 16
    mlp_ratio: int = 4
    num_blocks: int = 28
    patch_size: int = 2
    base_image_size: int = 32  # latent side at the reference resolution
    num_classes: int = 1001  # of stage 1; the last index means "no class"

    def __post_init__(self) -> None:
        require_at_least(1, **dataclasses.asdict(self))


# That follow a plan's recipe, the one to be taken first; TransformerEngine (te) needs a GPU.
FP8_BACKENDS = {"delayed": ("native",), "current": ("torchao", "te"), "rowwise": ("torchao",), "mxfp8": ("te",)}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One stage of training. The global batch does not depend on the number of ranks."""

    steps: int
    batch: int  # global batch, images
    lr: float
    warmup: int  # steps of linear warm-up
    final_lr: float = 1.0  # cosine decay ends at this fraction of lr; 1: constant
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-15
    clip: float = 1.0  # global gradient norm
    ema: float = 0.9999
    drop: float = 0.1  # share of conditions replaced by "none", for guidance
    short: float = 0.0  # share of short captions; stage 2, of a dataset with data.short_captions
    precision: Literal["bf16", "fp32"] = "bf16"
    fp8: bool = False  # needs a checkpoint that the conversion wrote
    fp8_backend: Literal["auto", "native", "torchao", "te"] = "auto"  # auto: by the recipe of the checkpoint's plan
    fp8_weight_gradient: bool = True  # false: the native backend's third product stays in BF16
    seed: int = 0
    skip_limit: int = 10  # steps in a row, left out as their gradient is not finite, after which training ends

    accumulate: int = 1  # micro-batches, one after the other, of which a rank's part of the batch is made up
    sharding: Literal["full", "hybrid"] = "full"  # hybrid: over the ranks of a node, with a replica on each node
    reshard: bool = True  # free a block's gathered weights after its forward pass: less memory, one gather more
    compile: bool = False  # each block, by torch.compile; the text encoder too
    one_pass: bool = False  # AdamW and the average of the weights as one compiled pass
    attention: Literal["measured", "torch"] = "measured"  # on a GPU: the fastest kernel there, or torch's own choice
    text_encoder: Literal["replicated", "sharded"] = "replicated"  # where the dataset has no states of the text
    activation_checkpointing: Literal["none", "selective", "full"] = "none"  # selective: products are kept

    log_every: int = 10
    fp8_every: int = 100  # steps between two looks at the scales, of which there are thousands
    save_every: int = 1000
    keep_last: int = 3  # checkpoints
    keep_every: int = 0  # and those of steps that are multiples of this; 0: no more
    validate_every: int = 0  # steps; 0: never
    validation_rows: int = 0  # kept from training, the same ones in both stages; at most a tenth of the dataset
    preview_every: int = 0  # steps; 0: never
    previews: int = 8  # pictures
    stall_minutes: float = 10.0  # without a step, after which every rank prints its stacks
    profile: int = 0  # step with which a trace of three steps begins; 0: none

    def __post_init__(self) -> None:
        require_at_least(1, steps=self.steps, batch=self.batch, log_every=self.log_every, save_every=self.save_every)
        require_at_least(1, accumulate=self.accumulate, skip_limit=self.skip_limit, keep_last=self.keep_last)
        require_at_least(1, previews=self.previews, fp8_every=self.fp8_every)
        require_at_least(0, warmup=self.warmup, lr=self.lr, weight_decay=self.weight_decay, clip=self.clip)
        if self.clip == 0:
            raise ValueError("clip=0: every gradient would become 0; what is never reached clips nothing")
        require_at_least(0, eps=self.eps, seed=self.seed)
        require_at_least(0, validate_every=self.validate_every, preview_every=self.preview_every, profile=self.profile)
        require_at_least(0, validation_rows=self.validation_rows, keep_every=self.keep_every)
        require_at_least(0.01, stall_minutes=self.stall_minutes)
        require_share(final_lr=self.final_lr, ema=self.ema, drop=self.drop, short=self.short)
        require_share(beta1=self.beta1, beta2=self.beta2)
        if 1 in (self.beta1, self.beta2):
            raise ValueError(f"beta1={self.beta1}, beta2={self.beta2}: must be less than 1")
        if self.validate_every and not self.validation_rows:
            raise ValueError(f"validate_every={self.validate_every}: needs validation_rows, which are 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """How pictures are sampled and, for the demo's scenes, counted."""

    steps: int = 20  # Euler
    guidance: float = 4.5
    seed: int = 0
    count: int = 64  # prompts taken from the dataset where none are given

    def __post_init__(self) -> None:
        require_at_least(1, steps=self.steps, count=self.count)
        require_at_least(0, seed=self.seed, guidance=self.guidance)


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditConfig:
    """What a dataset's audit lets pass, as shares of its rows; training refuses what does not pass."""

    max_rejected: float = 0.2  # for whatever reason
    max_plain: float = 0.02  # plain and near-plain
    max_duplicates: float = 0.05  # exact and near ones, the first of each group not counted
    max_same_opening: float = 0.5  # captions that begin with the same three words

    def __post_init__(self) -> None:
        require_share(
            max_rejected=self.max_rejected,
            max_plain=self.max_plain,
            max_duplicates=self.max_duplicates,
            max_same_opening=self.max_same_opening,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that a run depends on, except the cluster."""

    name: str
    data: DataConfig
    audit: AuditConfig
    model: ModelConfig
    stage1: TrainConfig
    stage2: TrainConfig
    sample: SampleConfig

    def train(self, stage: int) -> TrainConfig:
        return self.stage1 if stage == 1 else self.stage2


def is_url(path: str) -> bool:
    """Whether a dataset's path means one that lies elsewhere."""
    return "://" in path


def require_at_least(least: float, **values: float) -> None:
    """Raises ValueError for the first value that is smaller, or no finite number."""
    for name, value in values.items():
        if not value >= least:
            raise ValueError(f"{name}={value}: must be at least {least}")
        if math.isinf(value):
            raise ValueError(f"{name}={value}: must be finite")
        if value >= 2**63:
            raise ValueError(f"{name}={value}: must be less than 2**63")


def require_share(**values: float) -> None:
    """Raises ValueError for the first value that is no share."""
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name}={value}: must lie between 0 and 1")


def override(recipe: Recipe, assignments: list[str]) -> Recipe:
    """Returns `recipe` with each `dotted.key=value` applied.

    Raises ValueError naming the key and what is allowed for an unknown key or a value of the wrong type.
    """
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise ValueError(f"override {assignment!r}: write it as key=value, for example stage1.steps=100")
        recipe = _replace(recipe, key.split("."), text, key)
    return recipe


def _replace(config: Any, path: list[str], text: str, key: str) -> Any:
    name, rest = path[0], path[1:]
    allowed = [field.name for field in dataclasses.fields(config)]
    if name not in allowed:
        raise ValueError(f"unknown configuration key {key!r}: {name!r} is not one of {', '.join(allowed)}")
    value = getattr(config, name)
    if dataclasses.is_dataclass(value):
        if not rest:
            inner = ", ".join(f"{key}.{field.name}" for field in dataclasses.fields(value))
            raise ValueError(f"configuration key {key!r} is a group; set one of {inner}")
        return dataclasses.replace(config, **{name: _replace(value, rest, text, key)})
    if rest:
        raise ValueError(f"unknown configuration key {key!r}: {name!r} has no parts")
    parsed = parse_value(get_type_hints(type(config))[name], text, key)
    try:
        return dataclasses.replace(config, **{name: parsed})
    except ValueError as error:
        raise ValueError(f"{key.removesuffix(name)}{error}") from None


def parse_value(kind: Any, text: str, key: str) -> Any:
    """Reads `text` as a value of the annotated type `kind`, one of those that the configuration uses."""
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ValueError(f"{key}={text!r}: must be one of {', '.join(get_args(kind))}")
        return text
    if get_origin(kind) in (typing.Union, types.UnionType):  # only `T | None` is used
        if text.lower() == "none":
            return None
        return parse_value(get_args(kind)[0], text, key)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{key}={text!r}: must be true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{key}={text!r}: must be of type {kind.__name__}") from None


def to_json(recipe: Recipe) -> str:
    return json.dumps(dataclasses.asdict(recipe), indent=2)


def from_json(text: str) -> Recipe:
    """Rebuilds the recipe that `to_json` wrote; unknown fields raise TypeError."""
    values = json.loads(text)
    return Recipe(
        name=values["name"],
        data=read_data(values["data"]),
        audit=AuditConfig(**values["audit"]),
        model=ModelConfig(**values["model"]),
        stage1=TrainConfig(**values["stage1"]),
        stage2=TrainConfig(**values["stage2"]),
        sample=SampleConfig(**values["sample"]),
    )


def read_data(values: dict[str, Any]) -> DataConfig:
    """Rebuilds the dataset's part from its dictionary, as JSON holds it; unknown fields raise TypeError."""
    return DataConfig(**{**values, "screening": ScreeningConfig(**values["screening"])})


def fp8_backend(wanted: str, recipe: str) -> str:
    """What trains in FP8 by a plan of this recipe. Raises ValueError where `wanted` does not."""
    able = FP8_BACKENDS[recipe]
    if wanted not in ("auto", *able):
        allowed = ", ".join(f"{' or '.join(backends)} for {name}" for name, backends in FP8_BACKENDS.items())
        raise ValueError(
            f"fp8_backend={wanted}: does not follow the plan's recipe {recipe!r} ({allowed}); convert with another "
            "--recipe to train here"
        )
    return able[0] if wanted == "auto" else wanted
