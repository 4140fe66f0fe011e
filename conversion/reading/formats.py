"""Reading of training checkpoints in several formats, recognized by content.

    a directory with training.json   checkpoint directory of this suite, or a run folder that has one
    a directory with .metadata       torch.distributed.checkpoint: {"model", "model_ema", "optimizer", "step"}
    a directory with config.json     weights only, as `DiT.save_pretrained` writes them
    a directory with _METADATA       Orbax of the original JAX training: an item, its step, or the folder of all steps
    a zip archive                    `.pt` file of the original training: the same four entries, or weights only
    a safetensors file               weights only

Parameter names may carry the prefixes `_orig_mod.` and `module.`; tensors may be float32 or bfloat16. Tensors are
memory-mapped, and converted to float32 when they are accessed. No code in a file is ever executed. In state
dictionaries of TransformerEngine, extra states are skipped.
"""

import dataclasses
import hashlib
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from conversion.reading import orbax, orbax_metadata
from conversion.reading.training_state import StoredState, assemble, validated
from conversion.reading.transformer_engine import without_extra_states
from pixart.checkpoint import dcp_reader
from pixart.checkpoint import directory as checkpoints
from pixart.checkpoint.directory import Checkpoint
from pixart.data.torch_archive import check_archive

SUITE_FORMAT = "checkpoint directory"


def read(path: str | Path, *, base_latent_size: int | None = None) -> Checkpoint:
    """Read a checkpoint, whichever format it has.

    Raises ValueError, with a message of one line, if the path does not exist, is not a checkpoint or is truncated, or
    if the shapes of its tensors do not make a model. A tensor with a value that is not finite raises ValueError when
    it is accessed.
    """
    path = locate(Path(path))
    if not path.is_file() and not path.is_dir():
        raise ValueError(f"{path}: no such file or directory")
    if path.is_dir() and (path / dcp_reader.METADATA).exists():
        stored = from_groups(dcp_reader.read_training_state(path), path, "torch.distributed.checkpoint")
    elif path.is_dir() and (path / checkpoints.WEIGHTS).exists():
        stored = read_diffusers(path)
    elif orbax_metadata.find(path):
        return orbax.read(path, base_latent_size)
    elif path.is_dir():
        if base_latent_size is not None:
            raise ValueError(
                f"--base-latent-size: the checkpoint {path} records its latent size; give the option only for files "
                "that do not"
            )
        return read_checkpoint_directory(checkpoints.find(path))
    elif is_safetensors(path):
        stored = StoredState(source_format="safetensors", model=load_safetensors(path))
    else:
        stored = read_pt(path)
    return assemble(stored, path, base_latent_size)


def locate(path: Path) -> Path:
    """Return the newest step if `path` is a folder of Orbax checkpoints, and otherwise `path`."""
    return orbax_metadata.find(path) or path


def read_checkpoint_directory(path: Path) -> Checkpoint:
    """Read a checkpoint directory of this suite."""
    checkpoint = checkpoints.load(path)
    checkpoint.provenance = {**checkpoint.provenance, "source_format": SUITE_FORMAT}
    for group in ("model", "ema", "optimizer"):
        setattr(checkpoint, group, validated(getattr(checkpoint, group), f"{path}: {group}"))
    return checkpoint


def read_diffusers(path: Path) -> StoredState:
    """Read a folder that `DiT.save_pretrained` wrote."""
    config = load_json_object(path / "config.json")
    unset = (None, False)  # of arguments that the model does not use
    model_config = {key: value for key, value in config.items() if not key.startswith("_") and value not in unset}
    return StoredState(
        source_format="diffusers folder", model=load_safetensors(path / checkpoints.WEIGHTS), config=model_config
    )


def load_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError if the file cannot be read or contains anything else."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object")
    return content


def is_safetensors(path: Path) -> bool:
    """Return whether a file has a JSON header after 8 bytes of length, as safetensors files do."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Load a safetensors file. Raises ValueError if it cannot be read."""
    try:
        with safe_open(path, framework="pt"):
            pass
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: it is not a safetensors file, or it is truncated") from error


def read_pt(path: Path) -> StoredState:
    """Read a file that `torch.save` wrote, memory-mapped.

    Raises ValueError if it cannot be read, or holds objects other than tensors, containers and plain values.
    """
    check_archive(path, "PyTorch checkpoint")
    try:
        with torch.serialization.safe_globals([io.BytesIO]):  # inert bytes: extra states of early TransformerEngine
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises many types of exception for a damaged archive
        if refused := re.search(r"(?:Unsupported global:|unsupported) GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{path} cannot be read: it refers to {refused[1]}, and only tensors, containers and plain values are "
                "loaded; save the state dictionaries with plain tensors"
            ) from error
        raise ValueError(f"{path} cannot be read: it is not a PyTorch checkpoint, or it is truncated") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a training checkpoint: it has no entry 'model' with named tensors")
    tensors = without_extra_states(content)
    if "model" not in tensors and tensors and all(isinstance(value, Tensor) for value in tensors.values()):
        return StoredState(source_format=".pt, weights only", model=content, is_original=True)
    return dataclasses.replace(from_groups(content, path, ".pt of the original training"), is_original=True)


def from_groups(content: Mapping[str, Any], path: Path, source_format: str) -> StoredState:
    """Check the types of `{"model", "model_ema", "optimizer", "step"}`; only "model" is required.

    Raises ValueError if an entry has the wrong type.
    """
    model, ema, step = content.get("model"), content.get("model_ema"), content.get("step", -1)
    optimizer = content.get("optimizer") or {}
    states = optimizer.get("state") if isinstance(optimizer, Mapping) else None
    param_groups = optimizer.get("param_groups") if isinstance(optimizer, Mapping) else None
    if not isinstance(model, Mapping) or not model:
        raise ValueError(f"{path} is not a training checkpoint: it has no entry 'model' with named tensors")
    if ema is not None and not isinstance(ema, Mapping):
        raise ValueError(f"{path}: 'model_ema' does not hold named tensors")
    if optimizer and not (isinstance(states, Mapping) and all(isinstance(state, Mapping) for state in states.values())):
        raise ValueError(f"{path}: 'optimizer' is not a state dict of AdamW")
    if isinstance(step, Tensor) and step.numel() == 1:
        step = step.item()
    if not isinstance(step, int) or step < -1:
        raise ValueError(f"{path}: 'step' is not a step number, an integer of at least -1")
    if param_groups is not None and not isinstance(param_groups, list):
        raise ValueError(f"{path}: 'param_groups' of the optimizer is not a list")
    moments = {f"{key}.{name}": value for key, state in (states or {}).items() for name, value in state.items()}
    return StoredState(
        source_format=source_format,
        model=model,
        ema=ema or None,
        moments=moments or None,
        param_groups=param_groups,
        step=step,
    )


def file_hash(path: str | Path) -> str:
    """Return the SHA-256 of a file, or of the SHA-256s of a directory's files, sorted by path."""
    path = Path(path)
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            digest.update(bytes.fromhex(file_hash(file)))
    return digest.hexdigest()
