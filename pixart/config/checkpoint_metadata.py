"""The metadata of checkpoints and of FP8 weights for inference: its schema and its reader. Imports no torch."""

from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import msgspec

from pixart import records
from pixart.records import Checksums, Count

FORMAT = 2
LEGACY_FORMAT = 1  # of version 0.1: only the files in `state` have checksums, by their names there
MARKER = "training.json"  # written last; marks the checkpoint complete
STATE = "state"

Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 20)]  # of one dimension of a model
Values = Annotated[list[float], msgspec.Meta(min_length=1)]


class ModelRecord(TypedDict):
    """The configuration of a DiT, as diffusers stores it, which adds keys with an underscore."""

    in_dim: Size
    dim: Size
    cond_dim: NotRequired[Size]
    num_heads: NotRequired[Size]
    mlp_ratio: NotRequired[Size]
    num_blocks: NotRequired[Size]
    patch_size: NotRequired[Size]
    base_image_size: NotRequired[Size]
    num_classes: NotRequired[Size | None]
    text_dim: NotRequired[Size | None]
    qk_norm_eps: NotRequired[float | None]
    qk_norm_bias: NotRequired[bool]


class NormalizationRecord(TypedDict):
    """The normalization of latents; see `pixart.checkpoint.normalization`."""

    mean: Values
    std: Values
    pixel_range: NotRequired[tuple[int, int]]


class PlanRecord(TypedDict):
    """The FP8 plan; see `pixart.model.fp8.plan`."""

    linears: list[str]
    kept: NotRequired[dict[str, str]]
    recipe: NotRequired[str]
    history: NotRequired[Size]
    margin: NotRequired[int]
    batch: NotRequired[Size]


class Provenance(TypedDict, total=False):
    """Where a checkpoint comes from, as far as commands read it."""

    converted_from: str
    source_sha256: str
    recipe: str | None
    dataset_hash: str | None
    models: dict[str, str]
    acceptance: str


class CheckpointRecord(TypedDict):
    """The content of `training.json`."""

    format: Literal[1, 2]
    stage: Literal[1, 2]
    step: Count
    config: ModelRecord
    normalization: NormalizationRecord
    plan: PlanRecord | None
    dataset: str | None
    provenance: Provenance
    files: Checksums | None


class InferenceRecord(TypedDict):
    """The content of `inference.json`; that of version 0.1 has neither checksums nor a provenance."""

    linears: list[str]
    stage: Literal[1, 2]
    step: Count
    dataset: str | None
    normalization: NormalizationRecord
    provenance: NotRequired[Provenance]
    files: NotRequired[Checksums]


def read_record(directory: Path) -> dict[str, Any]:
    """Return the metadata of a checkpoint, with files by their paths relative to it.

    In format 1, of version 0.1, the metadata has no checksum and files are named relative to the folder `state`.
    Raises ValueError if it is damaged or of another version, and OSError if it cannot be read.
    """
    marker = directory / MARKER
    version = records.read(marker, dict[str, Any]).get("format")
    if version not in (LEGACY_FORMAT, FORMAT):
        if version is None:
            raise ValueError(f"{marker}: is damaged, it names no format; restore it")
        raise ValueError(f"{directory}: has checkpoint format {version!r}; supported are {LEGACY_FORMAT} and {FORMAT}")
    record = records.read(marker, CheckpointRecord)
    if version == LEGACY_FORMAT and records.CHECKSUM not in record:
        return {**record, "files": {f"{STATE}/{name}": values for name, values in (record["files"] or {}).items()}}
    records.check(record, str(marker))
    return record
