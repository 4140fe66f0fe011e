"""A checkpoint directory: the complete training state, by parameter name.

As the conversion writes it, in one process:

    step-00000400.fp8/
      transformer/            master weights, float32, a diffusers folder (`DiT.from_pretrained`)
      ema/                    EMA weights, likewise
      optimizer.safetensors   AdamW's NAME.exp_avg, NAME.exp_avg_sq and NAME.step
      fp8.safetensors         FP8 scales and histories (`fp8.scaling.scale_state`), if there is a plan
      training.json           stage, step, configuration, normalization, plan, provenance; written last

As training writes it, each rank its own shards (torch.distributed.checkpoint):

    step-00000400/
      state/                  model.NAME, ema.NAME, optimizer.NAME.exp_avg and so on, scales.NAME.scale and so on
      training.json           the same

`training.json` has the length and CRC-32C of every other file, and a SHA-256 of its own content, all of which `load`
checks; FP8 weights in `inference/` have a record of their own.
A checkpoint is written under a temporary name and renamed, so that a directory with its final name is complete. Tensors
are read and written one at a time: a checkpoint may be larger than memory.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pixart import records
from pixart.atomic import atomic_directory, write_file
from pixart.checkpoint import integrity
from pixart.checkpoint.dcp_reader import lazy_groups
from pixart.checkpoint.lazy_tensors import State
from pixart.checkpoint.normalization import Normalization
from pixart.checkpoint.safetensors_stream import load_tensors, save_tensors
from pixart.config.checkpoint_metadata import FORMAT, MARKER, STATE, read_record
from pixart.config.latent_space import recorded_pixel_range
from pixart.model.dit import DiT
from pixart.model.fp8.plan import Plan
from pixart.relocation import home_of, portable, present

EXCLUDED = ("training.json", "inference")  # not among the files of the metadata
GROUPS = ("model", "ema", "optimizer", "scales")
WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name
STATE_FILES = {"model": f"transformer/{WEIGHTS}", "ema": f"ema/{WEIGHTS}", "optimizer": "optimizer.safetensors"}
SCALES = "fp8.safetensors"


@dataclass(kw_only=True, slots=True)
class Checkpoint:
    """Training state, unsharded and on the CPU."""

    stage: int
    step: int  # optimizer steps done in this stage
    config: dict[str, Any]  # of the DiT
    normalization: Normalization
    model: State = field(default_factory=dict)
    ema: State = field(default_factory=dict)
    optimizer: State = field(default_factory=dict)
    plan: Plan | None = None
    scales: State = field(default_factory=dict)
    dataset: str | None = None  # path of the training dataset
    provenance: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, State]:
        """Return the tensors by group of GROUPS."""
        return {group: getattr(self, group) for group in GROUPS}


def save(checkpoint: Checkpoint, directory: str | Path) -> Path:
    """Write a checkpoint directory atomically, replacing an existing one."""
    directory = Path(directory)
    with atomic_directory(directory) as partial:
        write_metadata(checkpoint, partial, write_state(checkpoint, partial))
    return directory


def write_state(checkpoint: Checkpoint, partial: Path) -> dict[str, tuple[int, int]]:
    """Write weights, EMA weights and optimizer state in parallel, with one core each to avoid oversubscription.

    Returns the length and CRC-32C of the files of tensors by their path relative to `partial`.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor() as pool:
            futures = [
                pool.submit(save_weights, checkpoint.model, checkpoint.config, partial / "transformer"),
                pool.submit(save_weights, checkpoint.ema, checkpoint.config, partial / "ema"),
                pool.submit(save_tensors, checkpoint.optimizer, partial / STATE_FILES["optimizer"]),
            ]
    finally:
        torch.set_num_threads(threads)
    return {name: future.result() for name, future in zip(STATE_FILES.values(), futures, strict=True)}


def write_metadata(checkpoint: Checkpoint, partial: Path, known: Mapping[str, Sequence[int]]) -> None:
    """Write the FP8 scales, then the metadata, which marks the checkpoint complete.

    `known` has the length and CRC-32C of files that need not be read again. The scales of a distributed checkpoint are
    in its state.
    """
    if checkpoint.plan is not None and not (partial / STATE).exists():
        save_tensors(checkpoint.scales, partial / SCALES)
    files = integrity.list_files(partial, known, EXCLUDED)
    record = portable(record_of(checkpoint), home_of(partial))
    write_file(partial / MARKER, records.dumps({"format": FORMAT, **record, "files": files}))


def record_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the metadata of a checkpoint as JSON values."""
    return {
        "stage": checkpoint.stage,
        "step": checkpoint.step,
        "config": checkpoint.config,
        "normalization": dataclasses.asdict(checkpoint.normalization),
        "plan": None if checkpoint.plan is None else dataclasses.asdict(checkpoint.plan),
        "dataset": checkpoint.dataset,
        "provenance": checkpoint.provenance,
    }


def save_weights(state: State, config: Mapping[str, Any], folder: Path) -> tuple[int, int]:
    """Write a diffusers folder, which `DiT.from_pretrained` reads; return the length and CRC-32C of its weights."""
    folder.mkdir(parents=True)
    write_file(folder / "config.json", (json.dumps({"_class_name": DiT.__name__, **config}, indent=2) + "\n").encode())
    return save_tensors(state, folder / WEIGHTS)


def read_metadata(directory: str | Path) -> dict[str, Any]:
    """Return the content of `training.json`. Raises ValueError if the directory is not a checkpoint."""
    try:
        return present(read_record(Path(directory)), home_of(Path(directory)))
    except OSError as error:
        raise ValueError(f"{directory}: not a checkpoint; it has no readable {MARKER}") from error


def normalization_of(metadata: Mapping[str, Any]) -> Normalization:
    """Return the normalization in a checkpoint's metadata."""
    recorded = {key: tuple(values) for key, values in metadata["normalization"].items()}
    return Normalization(**{**recorded, "pixel_range": recorded_pixel_range(metadata)})


def load(directory: str | Path, *, verify: bool = True) -> Checkpoint:
    """Load a checkpoint; tensors of a distributed one are read on access.

    `verify` compares all files with their checksums; leave it out only where `check_files` was called. Raises
    ValueError naming what is missing, damaged or of the wrong shape.
    """
    directory = Path(directory)
    if verify:
        check_files(directory)
    checkpoint = load_without_tensors(directory)
    if is_distributed(directory):
        groups = lazy_groups(directory / STATE, GROUPS)
        states: dict[str, State] = {**groups}
        shapes: dict[str, State] = {group: tensors.shapes for group, tensors in groups.items()}
    else:
        model, ema, optimizer = load_state(directory)
        scales = load_tensors(directory / SCALES) if checkpoint.plan else {}
        states = shapes = {"model": model, "ema": ema, "optimizer": optimizer, "scales": scales}
    for group in GROUPS:
        setattr(checkpoint, group, states[group])
    for group, folder in (("model", "transformer"), ("ema", "ema")):
        integrity.check_shapes(shapes[group], checkpoint.config, f"{directory}/{folder}")
    return checkpoint


def is_distributed(directory: Path) -> bool:
    """Return whether a checkpoint's tensors are in shards, which its metadata lists."""
    return any(name.startswith(f"{STATE}/") for name in read_metadata(directory)["files"])


def load_without_tensors(directory: Path) -> Checkpoint:
    """Load a checkpoint's metadata only. Raises ValueError if it is missing, damaged or of another version."""
    metadata = read_metadata(directory)
    try:
        return Checkpoint(
            stage=metadata["stage"],
            step=metadata["step"],
            config=metadata["config"],
            normalization=normalization_of(metadata),
            plan=metadata["plan"] and Plan(**{**metadata["plan"], "linears": tuple(metadata["plan"]["linears"])}),
            dataset=metadata["dataset"],
            provenance=metadata["provenance"],
        )
    except (TypeError, LookupError) as error:
        raise ValueError(f"{directory / MARKER}: damaged or of another version: {error}") from None


def check_files(directory: Path, part: slice = slice(None)) -> None:
    """Check the files of a checkpoint against their recorded checksums; `part` selects some of them.

    Raises ValueError for a file that is missing, damaged or truncated.
    """
    files = list(read_metadata(directory)["files"].items())
    integrity.check_files(directory, dict(files[part]))


def check_part(path: Path) -> None:
    """Check a file or folder against the record of the checkpoint of this suite that it is part of, if there is one.

    Raises ValueError for a file that is missing, damaged or truncated.
    """
    path = path.resolve()
    for directory in path.parents[:2]:
        if (directory / MARKER).exists():
            part = path.relative_to(directory).as_posix()
            files = read_metadata(directory)["files"]
            integrity.check_files(directory, {name: files[name] for name in files if f"{name}/".startswith(f"{part}/")})


def load_state(directory: Path, load: Callable[[Path], State] = load_tensors) -> tuple[State, State, State]:
    """Load the weights, EMA weights and optimizer state that `write_state` wrote."""
    model, ema, optimizer = (load(directory / file) for file in STATE_FILES.values())
    return model, ema, optimizer


def list_checkpoints(run: str | Path) -> list[Path]:
    """Return the checkpoints of a training run, oldest first, without those that were converted next to them."""
    return sorted(marker.parent for marker in Path(run).glob(f"checkpoints/step-{8 * '[0-9]'}/{MARKER}"))


def find(path: str | Path) -> Path:
    """Return `path` if it is a checkpoint, or the newest checkpoint of a run folder.

    Raises ValueError if it is neither.
    """
    if (Path(path) / MARKER).exists():
        return Path(path)
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise ValueError(f"{path}: neither a checkpoint nor the folder of a run with checkpoints")
    return checkpoints[-1]
