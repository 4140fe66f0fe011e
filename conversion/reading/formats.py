"""Reading of training checkpoints in several formats, recognized by content.

    a directory with training.json   checkpoint directory of this suite, or a run folder that has one
    a directory with .metadata       torch.distributed.checkpoint of parts, as `parts` recognizes them
    a directory with config.json     weights only, as `DiT.save_pretrained` writes them
    other directories, and indices   weights in several files, accelerate, DeepSpeed, as `folders.layout` lists them
    a directory with _METADATA       Orbax of the original JAX training: an item, its step, or the folder of all steps
    a zip archive                    `.pt` file of `torch.save`: the same parts, or weights only
    torch's magic number             the same, in the format before torch 1.6
    a safetensors file               weights only

Parameter names may have the names of wrappers in them, such as `_orig_mod.` and `module.`; tensors may be float32 or
bfloat16. Tensors are memory-mapped, and converted to float32 when they are accessed. No code in a file is ever
executed. In state dictionaries of TransformerEngine, extra states are skipped.
"""

import dataclasses
import hashlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from conversion.reading import orbax, orbax_metadata, torch_file
from conversion.reading.folders import layout, loading
from conversion.reading.parts import Parts, find_parts
from conversion.reading.state_dicts import is_state
from conversion.reading.training_state import StoredState, assemble, validated
from pixart import records
from pixart.checkpoint import dcp_reader
from pixart.checkpoint import directory as checkpoints
from pixart.checkpoint.directory import Checkpoint
from pixart.checkpoint.inert import Inert, as_value, describe
from pixart.model.dit import DiT
from pixart.training.optimizer import MOMENTS

SUITE_FORMAT = "checkpoint directory"


def read(path: str | Path, *, base_latent_size: int | None = None, ignore_unknown: bool = False) -> Checkpoint:
    """Read a checkpoint, whichever format it has.

    Raises ValueError, with a message of one line, if the path does not exist, is not a checkpoint or is truncated, if
    the shapes of its tensors do not make a model, or, unless `ignore_unknown`, if a part of it looks like training
    state and is not understood. A tensor with a value that is not finite raises ValueError when
    it is accessed.
    """
    path = locate(Path(path))
    if not path.is_file() and not path.is_dir():
        raise ValueError(f"{path}: no such file or directory")
    checkpoints.check_part(path)
    if path.is_dir() and (path / dcp_reader.METADATA).exists():
        parts = find_parts(dcp_reader.read_training_state(path), path, ignore_unknown=ignore_unknown)
        stored = from_parts(parts, path, "torch.distributed.checkpoint", ignore_unknown=ignore_unknown)
    elif path.is_dir() and (path / checkpoints.WEIGHTS).exists():
        stored = read_diffusers(path)
    elif layout.is_index(path) or layout.is_state_folder(path):
        content, name = loading.read(path, load_any)
        parts = find_parts(content, path, ignore_unknown=ignore_unknown)
        stored = from_parts(parts, path, name, ignore_unknown=ignore_unknown)
        stored = dataclasses.replace(stored, config=config_beside(path))
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
        parts = find_parts(load_safetensors(path), path, ignore_unknown=ignore_unknown)
        stored = from_parts(parts, path, "safetensors", ignore_unknown=ignore_unknown)
    else:
        stored = read_pt(path, ignore_unknown=ignore_unknown)
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
    config = model_config(load_json_object(path / "config.json"))
    return StoredState(
        source_format="diffusers folder", model=load_safetensors(path / checkpoints.WEIGHTS), config=config
    )


def model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the model in a configuration, which diffusers' EMAModel extends by its own.

    A missing one has the model's default.
    """
    names = inspect.signature(DiT.__init__).parameters
    given = {key: value for key, value in config.items() if key in names}
    if not given:
        return {}
    defaults = {name: one.default for name, one in names.items() if one.kind is inspect.Parameter.KEYWORD_ONLY}
    return {key: value for key, value in {**defaults, **given}.items() if value is not None and value is not False}


def config_beside(path: Path) -> dict[str, Any] | None:
    """Return the configuration that `DiT.save_pretrained` has written beside weights in several files, if it has."""
    folder = path if path.is_dir() else path.parent
    for file in (folder / "config.json", *(item / "config.json" for item in layout.module_folders(folder))):
        if file.is_file() and (config := model_config(load_json_object(file))):
            return config
    return None


def load_any(path: Path) -> Any:
    """Load a safetensors file, or one of `torch.save`. Raises ValueError if it cannot be read."""
    return load_safetensors(path) if is_safetensors(path) else as_value(torch_file.load(path))


def load_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError if the file cannot be read or contains anything else."""
    try:
        return records.read(path, dict[str, Any])
    except OSError as error:
        raise ValueError(f"{path}: cannot be read; copy the checkpoint again") from error


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


def read_pt(path: Path, *, ignore_unknown: bool) -> StoredState:
    """Read a file that `torch.save` wrote, memory-mapped where its format allows it.

    Raises ValueError if it cannot be read, or as `find_parts` does.
    """
    content = as_value(torch_file.load(path))
    if isinstance(content, Inert):
        raise ValueError(f"{path}: is an object of {content.path}, whose class is not loaded; save its state_dict()")
    if not isinstance(content, Mapping):
        elements = f" of {', '.join(map(describe, content[:5]))}" if isinstance(content, list | tuple) else ""
        raise ValueError(
            f"{path} is not a training checkpoint: it holds a {describe(content)}{elements}, which names nothing; save "
            "a dictionary with the entries 'model', 'model_ema', 'optimizer' and 'step'"
        )
    parts = find_parts(content, path, ignore_unknown=ignore_unknown)
    is_bare = not parts.ema and parts.optimizer is None and not parts.unused and is_state(content)
    source_format = ".pt, weights only" if is_bare else ".pt of the original training"
    return dataclasses.replace(from_parts(parts, path, source_format, ignore_unknown=ignore_unknown), is_original=True)


def from_parts(parts: Parts, path: Path, source_format: str, *, ignore_unknown: bool) -> StoredState:
    """Return the state that the parts of a checkpoint make.

    Raises ValueError if the step is not a number of steps, or if the optimizer is not AdamW.
    """
    optimizer, unused = parts.optimizer or {}, list(parts.unused)
    states = {str(key): as_value(value) for key, value in as_value(optimizer.get("state", {})).items()}
    groups = as_value(optimizer.get("param_groups"))
    if states and not any(MOMENTS[0] in state for state in states.values()):
        if not ignore_unknown:
            fields = ", ".join(map(str, next(iter(states.values())))) or "nothing"
            raise ValueError(
                f"{path}: 'optimizer' is not a state dict of AdamW: the state of a parameter has {fields}; give "
                "--ignore-unknown to start with moments of zero"
            )
        states = {}
        unused.append("optimizer")
    if groups is not None and not isinstance(groups, list):
        raise ValueError(f"{path}: 'param_groups' of the optimizer is not a list")
    moments = {f"{key}.{name}": as_value(value) for key, state in states.items() for name, value in state.items()}
    others = sorted({str(name) for state in states.values() for name in state} - {*MOMENTS, "step"})
    return StoredState(
        source_format=source_format,
        model=parts.model,
        ema=parts.ema or None,
        moments=moments or None,
        param_groups=groups,
        step=last_step(parts, states, path),
        unused=[*unused, *(f"optimizer.{name}" for name in others)],
    )


def last_step(parts: Parts, states: Mapping[str, Mapping[str, Any]], path: Path) -> int:
    """Return the index of the last completed step, or -1.

    The original training saves this index, others the number of completed steps: AdamW's own count, where the file has
    one, decides which it is. Raises ValueError if the file's step is not a number of steps.
    """
    counts = [number_of(state.get("step")) for state in states.values()]
    count = max((int(value) for value in counts if isinstance(value, int | float)), default=0)
    if parts.step_name is None:
        return count - 1
    step = number_of(parts.step)
    if isinstance(step, float) and step.is_integer():
        step = int(step)
    if not isinstance(step, int) or isinstance(step, bool) or step < -1:
        raise ValueError(f"{path}: '{parts.step_name}' is not a step number, an integer of at least -1")
    return step - 1 if step == count and count else step


def number_of(value: Any) -> Any:
    """Return a tensor of one value as a number, and any other value unchanged."""
    value = as_value(value)
    return value.item() if isinstance(value, Tensor) and value.numel() == 1 else value


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
