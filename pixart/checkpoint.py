"""A checkpoint directory: all that training needs to go on, by parameter name.

    step-00000400/
      transformer/            master weights, float32, a diffusers folder (`DiT.from_pretrained`)
      ema/                    the exponential moving average, likewise
      optimizer.safetensors   AdamW's NAME.exp_avg, NAME.exp_avg_sq and NAME.step
      fp8.safetensors         NAME.scale and NAME.amax_history, in a checkpoint of FP8 training
      training.json           stage, step, normalization, plan, provenance; written last

A checkpoint is written under a temporary name and renamed, so that one which has its final name is whole. Tensors
are mapped from their files and written one at a time: a checkpoint may be larger than memory.
"""

import dataclasses
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pixart.model.dit import DiT, own_config, state_shapes
from pixart.model.fp8 import Plan

FORMAT = 1
MARKER = "training.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8"}


class Lazy(Mapping[str, Tensor]):
    """Tensors by name, each made when it is asked for and kept by nobody."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self.makers = makers

    def __getitem__(self, name: str) -> Tensor:
        return self.makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Normalization:
    """Latents as the model sees them: (latent - mean) / std, per channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def tensors(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:  # each (1, C, 1, 1)
        mean, std = (torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return mean, std

    def apply(self, latents: Tensor) -> Tensor:
        mean, std = self.tensors(latents.device)
        return (latents.float() - mean) / std

    def undo(self, normalized: Tensor) -> Tensor:
        mean, std = self.tensors(normalized.device)
        return normalized.float() * std + mean


@dataclass(kw_only=True, slots=True)
class Checkpoint:
    """A training state in memory, on the CPU and unsharded."""

    stage: int
    step: int  # optimizer steps done in this stage
    config: dict[str, Any]  # of DiT
    model: State
    ema: State
    optimizer: State
    normalization: Normalization
    plan: Plan | None = None
    scales: State = field(default_factory=dict)
    dataset: str | None = None  # path of the dataset it was trained on
    provenance: dict[str, Any] = field(default_factory=dict)


def save(checkpoint: Checkpoint, directory: str | Path) -> Path:
    """Writes `directory` whole or not at all, in place of one that is already there."""
    directory = Path(directory)
    with appearing(directory) as partial:
        write_state(checkpoint, partial)
        write_record(checkpoint, partial)
    return directory


def write_state(checkpoint: Checkpoint, partial: Path) -> None:
    """Weights, their average and the optimizer's state, side by side: while one file is synced, another is made."""
    with ThreadPoolExecutor() as pool:
        written = [
            pool.submit(save_weights, checkpoint.model, checkpoint.config, partial / "transformer"),
            pool.submit(save_weights, checkpoint.ema, checkpoint.config, partial / "ema"),
            pool.submit(save_tensors, checkpoint.optimizer, partial / "optimizer.safetensors"),
        ]
    for each in written:
        each.result()


def write_record(checkpoint: Checkpoint, partial: Path) -> None:
    """What is small; the record, which makes the directory a checkpoint, comes last."""
    if checkpoint.plan is not None:
        save_tensors(checkpoint.scales, partial / "fp8.safetensors")
    record = {
        "format": FORMAT,
        "stage": checkpoint.stage,
        "step": checkpoint.step,
        "normalization": dataclasses.asdict(checkpoint.normalization),
        "plan": None if checkpoint.plan is None else dataclasses.asdict(checkpoint.plan),
        "dataset": checkpoint.dataset,
        "provenance": checkpoint.provenance,
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


def save_tensors(state: State, path: Path) -> None:
    """The safetensors format: the header's length, the header, the tensors, of which one at a time is in memory.

    The header comes first and is not known before the last tensor is, so room is left for it, filled up by spaces.
    """
    room = 256 + sum(len(name) + 160 for name in state)
    room += -room % 8
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    with path.open("wb") as file:
        file.seek(8 + room)
        for name, tensor in state.items():
            begin = file.tell() - 8 - room
            write_tensor(tensor.detach().cpu(), file)
            end = file.tell() - 8 - room
            entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        header = json.dumps(entries, separators=(",", ":")).encode()
        assert len(header) <= room
        file.seek(0)
        file.write(room.to_bytes(8, "little") + header.ljust(room))
        file.flush()
        os.fsync(file.fileno())


def write_tensor(tensor: Tensor, file: BinaryIO) -> None:
    file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


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
    """Reads a checkpoint directory. Raises ValueError naming what is missing, damaged or of the wrong shape."""
    directory = Path(directory)
    record = read_record(directory)
    config = own_config(DiT.load_config(directory / "transformer"))
    plan = record["plan"] and Plan(**{**record["plan"], "linears": tuple(record["plan"]["linears"])})
    model, ema, optimizer = load_state(directory)
    checkpoint = Checkpoint(
        stage=record["stage"],
        step=record["step"],
        config=config,
        model=model,
        ema=ema,
        optimizer=optimizer,
        normalization=normalization(record),
        plan=plan,
        scales=load_tensors(directory / "fp8.safetensors") if plan else {},
        dataset=record["dataset"],
        provenance=record["provenance"],
    )
    check_shapes(checkpoint.model, config, f"{directory}/transformer")
    check_shapes(checkpoint.ema, config, f"{directory}/ema")
    return checkpoint


def load_state(directory: Path) -> tuple[State, State, State]:
    """The weights, average and optimizer's state that `write_state` wrote, mapped from the files."""
    files = f"transformer/{WEIGHTS}", f"ema/{WEIGHTS}", "optimizer.safetensors"
    model, ema, optimizer = (load_tensors(directory / file) for file in files)
    return model, ema, optimizer


def load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read, it may be truncated: {error}") from error


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
