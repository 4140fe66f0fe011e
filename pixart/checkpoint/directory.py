"""A checkpoint directory: all that training needs to go on, by parameter name.

As the conversion writes it, in one process:

    step-00000400.fp8/
      transformer/            master weights, float32, a diffusers folder (`DiT.from_pretrained`)
      ema/                    the exponential moving average, likewise
      optimizer.safetensors   AdamW's NAME.exp_avg, NAME.exp_avg_sq and NAME.step
      fp8.safetensors         NAME.scale, NAME.amax_history and NAME.overflow_share, where there is a plan
      training.json           stage, step, configuration, normalization, plan, provenance; written last

As training writes it, each rank its own part (torch.distributed.checkpoint):

    step-00000400/
      state/                  model.NAME, ema.NAME, optimizer.NAME.exp_avg and so on, scales.NAME.scale and so on
      training.json           the same, and the length and checksum of each file

A checkpoint is written under a temporary name and renamed, so that one which has its final name is whole. Tensors
are read and written one at a time: a checkpoint may be larger than memory.
"""

import dataclasses
import functools
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pixart.checkpoint import dcp_reader
from pixart.checkpoint.normalization import Normalization
from pixart.checkpoint.safetensors_stream import save_tensors
from pixart.model.dit import DiT, own_config, state_shapes
from pixart.model.fp8.plan import Plan

FORMAT = 1
MARKER = "training.json"
STATE = "state"
GROUPS = ("model", "ema", "optimizer", "scales")
WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name
STATE_FILES = {"model": f"transformer/{WEIGHTS}", "ema": f"ema/{WEIGHTS}", "optimizer": "optimizer.safetensors"}
PIECE = 1 << 24  # bytes that are read at once


class Lazy(Mapping[str, Tensor]):
    """Tensors by name, each made when it is asked for and kept by nobody; `shapes` are tensors without memory."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]], shapes: Mapping[str, Tensor] | None = None) -> None:
        self.makers, self.shapes = makers, shapes or {}

    def __getitem__(self, name: str) -> Tensor:
        return self.makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


State = Mapping[str, Tensor]


@dataclass(kw_only=True, slots=True)
class Checkpoint:
    """A training state in memory, on the CPU and unsharded."""

    stage: int
    step: int  # optimizer steps done in this stage
    config: dict[str, Any]  # of DiT
    normalization: Normalization
    model: State = field(default_factory=dict)
    ema: State = field(default_factory=dict)
    optimizer: State = field(default_factory=dict)
    plan: Plan | None = None
    scales: State = field(default_factory=dict)
    dataset: str | None = None  # path of the dataset it was trained on
    provenance: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, State]:
        return {group: getattr(self, group) for group in GROUPS}


def save(checkpoint: Checkpoint, directory: str | Path) -> Path:
    """Writes `directory` whole or not at all, in place of one that is already there."""
    directory = Path(directory)
    with appearing(directory) as partial:
        write_state(checkpoint, partial)
        write_record(checkpoint, partial)
    return directory


def write_state(checkpoint: Checkpoint, partial: Path) -> None:
    """Weights, their average and the optimizer's state, side by side, a core each: more would wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor() as pool:
            written = [
                pool.submit(save_weights, checkpoint.model, checkpoint.config, partial / "transformer"),
                pool.submit(save_weights, checkpoint.ema, checkpoint.config, partial / "ema"),
                pool.submit(save_tensors, checkpoint.optimizer, partial / STATE_FILES["optimizer"]),
            ]
    finally:
        torch.set_num_threads(threads)
    for each in written:
        each.result()


def write_record(checkpoint: Checkpoint, partial: Path, files: Mapping[str, Sequence[int]] | None = None) -> None:
    """What is small; the record, which makes the directory a checkpoint, comes last. `files`: length and CRC-32C."""
    if checkpoint.plan is not None and files is None:
        save_tensors(checkpoint.scales, partial / "fp8.safetensors")
    record = {
        "format": FORMAT,
        "stage": checkpoint.stage,
        "step": checkpoint.step,
        "config": checkpoint.config,
        "normalization": dataclasses.asdict(checkpoint.normalization),
        "plan": None if checkpoint.plan is None else dataclasses.asdict(checkpoint.plan),
        "dataset": checkpoint.dataset,
        "provenance": checkpoint.provenance,
        "files": files or {},
    }
    write(partial / MARKER, (json.dumps(record, indent=2) + "\n").encode())


@contextmanager
def appearing(directory: Path) -> Iterator[Path]:
    """A hidden directory beside it that takes the name, and the place of what has it, when all is written."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.mkdir()
    try:
        yield partial
        if directory.exists():
            old = partial.with_suffix(".old")
            directory.replace(old)
            partial.replace(directory)
            shutil.rmtree(old)
        else:
            partial.replace(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def save_weights(state: State, config: Mapping[str, Any], folder: Path) -> None:
    """A diffusers folder."""
    folder.mkdir(parents=True)
    write(folder / "config.json", (json.dumps({"_class_name": DiT.__name__, **config}, indent=2) + "\n").encode())
    save_tensors(state, folder / WEIGHTS)


def write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def read_record(directory: str | Path) -> dict[str, Any]:
    """The content of `training.json`. Raises ValueError where the directory is no checkpoint."""
    marker = Path(directory) / MARKER
    try:
        record = json.loads(marker.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{directory} is no checkpoint: it has no readable {MARKER}") from error
    if record.get("format") != FORMAT:
        raise ValueError(f"{directory} has checkpoint format {record.get('format')!r}, not {FORMAT}")
    return record


def normalization(record: dict[str, Any]) -> Normalization:
    return Normalization(**{key: tuple(values) for key, values in record["normalization"].items()})


def load(directory: str | Path) -> Checkpoint:
    """A checkpoint, its tensors mapped or read when they are asked for.

    Raises ValueError naming what is missing, damaged or of the wrong shape.
    """
    directory = Path(directory)
    checkpoint = describe(directory)
    if (directory / STATE).exists():
        check_files(directory)
        lazies = distributed_state(directory / STATE)
        states: dict[str, State] = {**lazies}
        shapes: dict[str, State] = {group: lazy.shapes for group, lazy in lazies.items()}
    else:
        model, ema, optimizer = load_state(directory)
        scales = load_tensors(directory / "fp8.safetensors") if checkpoint.plan else {}
        states = shapes = {"model": model, "ema": ema, "optimizer": optimizer, "scales": scales}
    for group in GROUPS:
        setattr(checkpoint, group, states[group])
    for group, folder in (("model", "transformer"), ("ema", "ema")):
        check_shapes(shapes[group], checkpoint.config, f"{directory}/{folder}")
    return checkpoint


def describe(directory: Path) -> Checkpoint:
    """All of a checkpoint but its tensors. Raises ValueError for what is no checkpoint or no longer whole."""
    record = read_record(directory)
    config = (
        record["config"] if (directory / STATE).exists() else own_config(DiT.load_config(directory / "transformer"))
    )
    try:
        return Checkpoint(
            stage=record["stage"],
            step=record["step"],
            config=config,
            normalization=normalization(record),
            plan=record["plan"] and Plan(**{**record["plan"], "linears": tuple(record["plan"]["linears"])}),
            dataset=record["dataset"],
            provenance=record["provenance"],
        )
    except (TypeError, LookupError) as error:
        raise ValueError(f"{directory / MARKER} is damaged, or of another version: {error}") from None


def distributed_state(folder: Path) -> dict[str, Lazy]:
    """The groups of what training wrote, each tensor whole. Raises ValueError where that cannot be read."""
    with dcp_reader.readable(folder):
        reader = dcp_reader.Reader(folder)
        keys: dict[str, list[str]] = {group: [] for group in GROUPS}
        for key in reader.entries:
            keys[key.partition(".")[0]].append(key)

    def lazy(group: str) -> Lazy:
        names = {key.removeprefix(f"{group}."): key for key in keys[group]}
        makers = {name: functools.partial(reader.one, key) for name, key in names.items()}
        return Lazy(makers, {name: torch.empty(reader.entries[key].size, device="meta") for name, key in names.items()})

    return {group: lazy(group) for group in GROUPS}


def checksum(path: Path) -> tuple[int, int]:
    """Length in bytes and CRC-32C of a file."""
    length = crc = 0
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            length, crc = length + len(piece), google_crc32c.extend(crc, piece)
    return length, crc


def check_files(directory: Path, part: slice = slice(None)) -> None:
    """Raises ValueError for a file that is not as it was written, of those that `part` chooses."""
    files = read_record(directory)["files"]
    for name, written in list(files.items())[part]:
        file = directory / STATE / name
        if not file.exists() or list(checksum(file)) != list(written):
            raise ValueError(f"{file} is missing, damaged or truncated")


def load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read, it may be truncated: {error}") from error


def load_state(directory: Path, load: Callable[[Path], State] = load_tensors) -> tuple[State, State, State]:
    """The weights, average and optimizer's state that `write_state` wrote, mapped from the files."""
    model, ema, optimizer = (load(directory / file) for file in STATE_FILES.values())
    return model, ema, optimizer


def check_shapes(state: State, config: dict[str, Any], name: str) -> None:
    """Raises ValueError unless `state` has just the tensors, of just the shapes, that the configuration asks for."""
    wanted = state_shapes(config)
    if missing := sorted(wanted.keys() - state.keys()):
        raise ValueError(f"{name} lacks {len(missing)} tensors of the model, such as {missing[0]}")
    if unknown := sorted(state.keys() - wanted.keys()):
        raise ValueError(f"{name} has {len(unknown)} tensors that the model does not know, such as {unknown[0]}")
    for key, shape in wanted.items():
        if tuple(state[key].shape) != shape:
            raise ValueError(f"{name}: {key} has shape {tuple(state[key].shape)}, the model needs {shape}")


def steps(run: str | Path) -> list[Path]:
    """The checkpoints of a training run, oldest first; not those that were converted beside them."""
    return sorted(marker.parent for marker in Path(run).glob(f"checkpoints/step-{8 * '[0-9]'}/{MARKER}"))


def find(path: str | Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest of a run folder; ValueError where there is none."""
    if (Path(path) / MARKER).exists():
        return Path(path)
    found = steps(path)
    if not found:
        raise ValueError(f"{path} is neither a checkpoint nor a run with one")
    return found[-1]
