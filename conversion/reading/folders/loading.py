"""Loading of the folders that `layout` recognizes, as the content that one file would have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from conversion.reading.folders import deepspeed
from conversion.reading.folders.layout import (
    INDEX_END,
    distributed_folders,
    files_of_index,
    find_deepspeed,
    is_index,
    module_folders,
    weight_files,
)
from pixart import records
from pixart.checkpoint import dcp_reader
from pixart.checkpoint.inert import as_value

OPTIMIZERS = ("optimizer.bin", "optimizer.pt", "optimizer.safetensors")
CUSTOM = "custom_checkpoint_"  # accelerate's name of an object that was registered, such as an EMA
TRAINER_STATE = "trainer_state.json"  # of transformers
DESCRIPTIONS = (".json", ".md", ".txt", ".yaml", ".log")  # of files that hold no training state
Load = Callable[[Path], Any]


class TrainerState(TypedDict):
    """What the Trainer of transformers records beside its weights."""

    global_step: int


def read(path: Path, load: Load) -> tuple[dict[str, Any], str]:
    """Return the content of an index of weights or of a folder, by part, and the name of its format.

    `load` loads a file. Raises ValueError if a file is missing or damaged.
    """
    if is_index(path):
        return {"model": load_index(path, load)}, "weights in several files"
    if folder := find_deepspeed(path):
        return deepspeed.read(folder, load), "DeepSpeed"
    content: dict[str, Any] = {}
    used: set[str] = set()
    for file in weight_files(path):
        name = file.name.removesuffix(INDEX_END).partition(".")[0].removeprefix("pytorch_")
        content[name.removeprefix("diffusion_pytorch_")] = load_weights(file, load)
        used.add(file.name)
        used |= files_of_index(file).keys() if is_index(file) else set()
    for folder in module_folders(path):
        content[folder.name] = load_weights(weight_files(folder)[0], load)
        used.add(folder.name)
    for folder in distributed_folders(path):
        content |= dcp_reader.read_training_state(folder)
        used.add(folder.name)
    for file in sorted(path.iterdir()):
        if file.name in used or file.suffix in DESCRIPTIONS or file.name.startswith("."):
            continue
        if file.is_dir():
            content[f"{file.name}/"] = None
        elif file.name in OPTIMIZERS:
            content["optimizer"] = load(file)
        elif file.name.startswith(CUSTOM):
            content[file.stem] = load(file)
        else:
            content[file.name] = None  # random states, schedulers and scalers, which are listed as unused
    content |= trainer_step(path)
    return content, "folder of accelerate"


def load_weights(path: Path, load: Load) -> Any:
    """Load a file of weights, or the files of an index."""
    return load_index(path, load) if is_index(path) else load(path)


def load_index(path: Path, load: Load) -> dict[str, Any]:
    """Return the weights of the files that an index names. Raises ValueError for a key that is not in its file."""
    weights: dict[str, Any] = {}
    for name, keys in files_of_index(path).items():
        content = as_value(load(path.parent / name))
        missing = [key for key in keys if not isinstance(content, dict) or key not in content]
        if missing:
            raise ValueError(f"{path}: {missing[0]!r} is not in {name}; copy the complete checkpoint")
        weights |= {key: content[key] for key in keys}
        if others := [key for key in content if key not in set(keys)]:
            raise ValueError(f"{path}: {name} has {str(others[0])!r}, which the index does not have; write it again")
    return weights


def trainer_step(folder: Path) -> dict[str, int]:
    """Return the step that the Trainer of transformers has written beside the weights."""
    try:
        state: TrainerState = records.read(folder / TRAINER_STATE, TrainerState)
    except (OSError, ValueError):
        return {}
    return {"global_step": state["global_step"]}
