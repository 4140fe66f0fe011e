"""Reading training checkpoints, whatever wrote them, recognized by content.

    a directory with training.json   our own, or a run folder with one
    a directory with .metadata       torch.distributed.checkpoint: {"model", "model_ema", "optimizer", "step"}
    a directory with config.json     weights alone, as `DiT.save_pretrained` writes them
    a zip archive                    the `.pt` of the original training: the same four, or weights alone
    a safetensors file               weights alone

Names may carry `_orig_mod.` and `module.`, tensors may be float32 or bfloat16. Tensors are mapped from their files and
made float32 when they are asked for; nothing that a file holds is ever run.
"""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from conversion.reading.training_state import Content, assemble, checked
from pixart.checkpoint import dcp_reader
from pixart.checkpoint import directory as checkpoints
from pixart.checkpoint.directory import Checkpoint

OWN = "checkpoint directory"


def read(path: str | Path, *, base_image_size: int | None = None) -> Checkpoint:
    """Reads a checkpoint by its content.

    Raises ValueError in one line for a path that does not exist, is no checkpoint, is truncated, or has tensors of
    shapes that make no model; and, when the tensor is asked for, for one with a value that is not finite.
    """
    path = Path(path)
    if not path.is_file() and not path.is_dir():
        raise ValueError(f"{path}: no such file or directory")
    if path.is_dir() and (path / dcp_reader.METADATA).exists():
        content = from_groups(dcp_reader.read(path), path, "torch.distributed.checkpoint")
    elif path.is_dir() and (path / checkpoints.WEIGHTS).exists():
        content = read_diffusers(path)
    elif path.is_dir():
        if base_image_size is not None:
            raise ValueError(f"--base-latent-size: {path} says its own, the option is for files that do not")
        return read_own(checkpoints.find(path))
    elif is_safetensors(path):
        content = Content(kind="safetensors", model=load_safetensors(path))
    else:
        content = read_pt(path)
    return assemble(content, path, base_image_size)


def read_own(path: Path) -> Checkpoint:
    read = checkpoints.load(path)
    read.provenance = {**read.provenance, "source_format": OWN}
    for field in ("model", "ema", "optimizer"):
        setattr(read, field, checked(getattr(read, field), f"{path}: {field}"))
    return read


def read_diffusers(path: Path) -> Content:
    config = json_object(path / "config.json")
    own = {key: value for key, value in config.items() if not key.startswith("_") and value is not None}
    return Content(kind="diffusers folder", model=load_safetensors(path / checkpoints.WEIGHTS), config=own)


def json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt"):
            pass
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: it is no safetensors file, or a truncated one") from error


def read_pt(path: Path) -> Content:
    check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged archive fails in as many ways as its reader has lines
        raise ValueError(f"{path} cannot be read: it is no PyTorch checkpoint, or a truncated one") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no training checkpoint: it has no 'model' with tensors by name")
    if "model" not in content and content and all(isinstance(value, Tensor) for value in content.values()):
        return Content(kind=".pt of weights alone", model=content)
    return from_groups(content, path, ".pt of the original training")


def check_archive(path: Path) -> None:
    """Refuses what torch.save never writes: entries that are compressed, or that claim more than the file has."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: it is no PyTorch checkpoint, or a truncated one") from error
    claimed = sum(entry.file_size for entry in entries)
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or claimed > path.stat().st_size:
        raise ValueError(f"{path} cannot be read: its entries are compressed or overlap, as in no PyTorch checkpoint")


def from_groups(content: Mapping[str, Any], path: Path, kind: str) -> Content:
    """`{"model", "model_ema", "optimizer", "step"}`; all but the first may be missing."""
    model, ema, step = content.get("model"), content.get("model_ema"), content.get("step", -1)
    optimizer = content.get("optimizer") or {}
    states = optimizer.get("state") if isinstance(optimizer, Mapping) else None
    if not isinstance(model, Mapping) or not model:
        raise ValueError(f"{path} is no training checkpoint: it has no 'model' with tensors by name")
    if ema is not None and not isinstance(ema, Mapping):
        raise ValueError(f"{path}: 'model_ema' holds no tensors by name")
    if optimizer and not (isinstance(states, Mapping) and all(isinstance(own, Mapping) for own in states.values())):
        raise ValueError(f"{path}: 'optimizer' is no state of AdamW")
    if isinstance(step, Tensor) and step.numel() == 1:
        step = step.item()
    if not isinstance(step, int) or step < -1:
        raise ValueError(f"{path}: 'step' is no number of a step")
    moments = {f"{key}.{name}": value for key, own in (states or {}).items() for name, value in own.items()}
    return Content(kind=kind, model=model, ema=ema or None, moments=moments or None, step=step)


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file, or of the hashes of a directory's files in order of their names."""
    path = Path(path)
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            digest.update(bytes.fromhex(file_hash(file)))
    return digest.hexdigest()
