"""Recognition of folders in which libraries keep a training state in several files, without loading any of them.

model.safetensors.index.json, pytorch_model.bin.index.json    weights in several files (transformers, diffusers)
model.safetensors, pytorch_model.bin, optimizer.bin           `save_state` of accelerate; the Trainer of transformers
pytorch_model_fsdp_0/, optimizer_0/                           the same with FSDP
transformer/, transformer_ema/, unet/                         trainers of diffusers, beside accelerate's files
mp_rank_00_model_states.pt, or latest that names its folder   DeepSpeed, also within accelerate's and Lightning's
"""

import os
from pathlib import Path
from typing import TypedDict

from pixart import records

INDEX_END = ".index.json"
METADATA = ".metadata"  # of torch.distributed.checkpoint
MARKER = "training.json"  # of a checkpoint directory of this suite
WEIGHT_STEMS = ("model", "pytorch_model", "diffusion_pytorch_model")
WEIGHT_ENDS = (".safetensors", ".bin")
MODEL_STATES = "mp_rank_00_model_states.pt"  # of DeepSpeed
PARTITIONED_MODEL_STATES = f"zero_pp_rank_0_{MODEL_STATES}"  # the same with ZeRO stage 3
LATEST = "latest"  # a file with the name of DeepSpeed's newest folder
MODULE_FOLDERS = ("transformer", "unet", "dit", "model")
EMA_FOLDERS = tuple(f"{name}_ema" for name in MODULE_FOLDERS)


class Index(TypedDict):
    """An index of weights in several files."""

    weight_map: dict[str, str]  # the file of each key


def is_index(path: Path) -> bool:
    """Return whether a path is a file that says which file has which weights."""
    return path.is_file() and path.name.endswith(INDEX_END)


def weight_files(folder: Path) -> list[Path]:
    """Return the files or indices of weights in a folder, of several models with accelerate: `model_1.safetensors`."""
    names = {path.name for path in folder.iterdir() if path.is_file()}
    files = []
    for end in WEIGHT_ENDS:
        stems = {name.removesuffix(INDEX_END).removesuffix(end) for name in names if end in name}
        for stem in sorted(stems):
            base, _, number = stem.rpartition("_")
            if stem in WEIGHT_STEMS or (base in WEIGHT_STEMS and number.isdecimal()):
                file = next((name for name in (f"{stem}{end}{INDEX_END}", f"{stem}{end}") if name in names), None)
                files += [folder / file] if file else []
    return files


def find_deepspeed(folder: Path) -> Path | None:
    """Return the folder of DeepSpeed's newest state, if there is one."""
    candidates = [folder, *(folder / name for name in ("pytorch_model", "checkpoint"))]
    for candidate in list(candidates):
        if (pointer := candidate / LATEST).is_file() and pointer.stat().st_size < 1 << 10:
            name = pointer.read_text(errors="replace").strip()
            candidates += [candidate / name] if name and name == Path(name).name else []
    states = (MODEL_STATES, PARTITIONED_MODEL_STATES)
    return next((item for item in candidates if any((item / name).is_file() for name in states)), None)


def module_folders(folder: Path) -> list[Path]:
    """Return the subfolders that have weights of the model, or of its EMA."""
    names = (*MODULE_FOLDERS, *EMA_FOLDERS)
    return [folder / name for name in names if (folder / name).is_dir() and weight_files(folder / name)]


def distributed_folders(folder: Path) -> list[Path]:
    """Return the subfolders of torch.distributed.checkpoint, as accelerate names them."""
    return sorted(
        path.parent
        for path in folder.glob(f"*/{METADATA}")
        if path.parent.name.startswith(("pytorch_model_fsdp", "optimizer_"))
    )


def is_state_folder(folder: Path) -> bool:
    """Return whether a folder has one of these layouts."""
    if not folder.is_dir() or (folder / MARKER).exists():
        return False
    return bool(weight_files(folder) or find_deepspeed(folder) or module_folders(folder) or distributed_folders(folder))


def files_of_index(path: Path) -> dict[str, list[str]]:
    """Return the keys by file of an index. Raises ValueError if it is damaged, or names a file of another folder."""
    try:
        index: Index = records.read(path, Index)
    except (OSError, ValueError):
        raise ValueError(f"{path}: cannot be read; it is not an index of weights, or it is damaged") from None
    files: dict[str, list[str]] = {}
    for key, name in index["weight_map"].items():
        if not name or name != Path(name).name or name in (".", ".."):
            raise ValueError(f"{path}: {name!r} is not the name of a file in its folder; correct the index")
        if not os.path.isfile(path.parent / name):  # noqa: PTH113 - Path.is_file raises an error for a long name
            raise ValueError(f"{path}: its file {name!r} is missing; copy the complete checkpoint")
        files.setdefault(name, []).append(key)
    return files
