"""Folders and metadata of Orbax checkpoints, as the original JAX training saved them; this module imports no torch.

    CHECKPOINTS/
      300000/                 a step
        _CHECKPOINT_METADATA  names its items
        state/                an item: weights, optimizer state
          _METADATA           names its arrays
          manifest.ocdbt      root of the database of arrays; without OCDBT, each array has a folder of its own
        model_ema/            an item: EMA weights

No file outside of these folders is read: symbolic links are refused, and so are names of arrays with other characters
than letters, digits and underscores.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixart import records

STATE, EMA = "state", "model_ema"
STEP_METADATA, ITEM_METADATA, MANIFEST = "_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"
MAX_METADATA_BYTES = 1 << 26  # a model of 28 blocks has 0.4 MB
MANIFEST_MAGIC = bytes.fromhex("0cdb3a2a")  # followed by the manifest's length, 8 bytes, little-endian
# Modules of the JAX stage 2 that stage 1 does not have.
STAGE2_MODULES = {"cross_attention", "adaLN1_single", "adaLN2_single"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """An item of a checkpoint: a tree of arrays in a folder."""

    folder: Path
    arrays: tuple[str, ...]  # names: the keys of the tree, joined by dots
    use_ocdbt: bool
    use_zarr3: bool
    stores_fill_values: bool  # a chunk that is absent is damage, not zeros
    num_bytes: int  # of all files


def find(path: Path) -> Path | None:
    """Return the step or item that `path` is, or the newest step in the folder `path`; None without a step."""
    if not path.is_dir() or is_item(path) or is_step(path):
        return path if path.is_dir() else None
    steps = [folder for folder in path.iterdir() if folder.name.isdecimal() and is_step(folder)]
    return max(steps, key=lambda folder: int(folder.name), default=None)


def is_item(folder: Path) -> bool:
    """Return whether a folder is an item of a checkpoint."""
    return any((folder / name).exists() for name in (ITEM_METADATA, MANIFEST))


def is_step(folder: Path) -> bool:
    """Return whether a folder is a step of a checkpoint."""
    return (folder / STEP_METADATA).exists() or any(is_item(folder / name) for name in (STATE, EMA))


def read_items(path: Path) -> tuple[Item, Item | None]:
    """Read the metadata of a step's items `state` and `model_ema`, the latter None if it was not saved.

    An item that is given as `path` is read alone. Raises ValueError if an item is missing, damaged or holds stage 2.
    """
    if is_item(path):
        return read_item(path), None
    declared = read_object(path / STEP_METADATA).get("item_handlers") if (path / STEP_METADATA).exists() else None
    names = {*(declared if isinstance(declared, Mapping) else ()), STATE} & {STATE, EMA}
    names |= {folder.name for folder in path.iterdir() if is_item(folder)}
    items: dict[str, Item] = {}
    for name in sorted(names, key=lambda name: (name in (STATE, EMA), name)):
        folder = path / name
        if folder.is_symlink():
            raise ValueError(f"{folder}: is a symbolic link; copy the checkpoint with the files that it links to")
        if not folder.is_dir():
            raise ValueError(
                f"{folder}: is missing; copy the checkpoint with all of its items, or give the item with the weights"
            )
        items[name] = read_item(folder)
    return items[STATE], items.get(EMA)


def read_item(folder: Path) -> Item:
    """Read the metadata of an item. Raises ValueError if it is missing, damaged or that of a stage-2 model."""
    num_bytes = count_bytes(folder)
    metadata = read_object(folder / ITEM_METADATA)
    tree = metadata.get("tree_metadata")
    if not isinstance(tree, Mapping):
        raise ValueError(f"{folder / ITEM_METADATA}: has no object 'tree_metadata'; give a checkpoint of StandardSave")
    arrays = [array_name(entry, folder) for entry in tree.values() if not is_skipped(entry)]
    if STAGE2_MODULES & {part for name in arrays for part in name.split(".")}:
        raise ValueError(
            f"{folder}: is a stage-2 model of the JAX training, whose code was never validated; convert a stage-1 "
            "checkpoint instead"
        )
    if len(arrays) != len(set(arrays)):
        raise ValueError(f"{folder / ITEM_METADATA}: names an array twice; it is damaged")
    item = Item(
        folder=folder,
        arrays=tuple(arrays),
        use_ocdbt=bool(metadata.get("use_ocdbt", True)),
        use_zarr3=bool(metadata.get("use_zarr3", False)),
        stores_fill_values=bool(metadata.get("store_array_data_equal_to_fill_value", False)),
        num_bytes=num_bytes,
    )
    if item.use_ocdbt:
        check_manifest(folder / MANIFEST)
    return item


def is_skipped(entry: Any) -> bool:
    """Return whether an entry of the tree has no array, such as a weight that is None."""
    value = entry.get("value_metadata") if isinstance(entry, Mapping) else None
    return isinstance(value, Mapping) and value.get("skip_deserialize") is True


def array_name(entry: Any, folder: Path) -> str:
    """Return the name of an array from its entry of the tree. Raises ValueError if it is not a valid name."""
    keys = entry.get("key_metadata") if isinstance(entry, Mapping) else None
    parts = [key.get("key") for key in keys if isinstance(key, Mapping)] if isinstance(keys, list) else []
    name = ".".join(str(part) for part in parts)
    if not re.fullmatch(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*", name):
        raise ValueError(
            f"{folder / ITEM_METADATA}: names an array {name[:80]!r}; its keys must consist of letters, digits and "
            "underscores"
        )
    return name


def count_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder. Raises ValueError for anything that is no file or folder in it."""
    num_bytes = 0
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise ValueError(f"{path}: is a symbolic link; copy the checkpoint with the files that it links to")
        if not path.is_file() and not path.is_dir():
            raise ValueError(f"{path}: is neither a file nor a folder; remove it from the checkpoint")
        num_bytes += path.stat().st_size if path.is_file() else 0
    return num_bytes


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object of metadata. Raises ValueError if the file is missing, too large or damaged."""
    if not path.is_file() or path.is_symlink():
        raise ValueError(f"{path}: is missing; copy the checkpoint with all of its files")
    try:
        if path.stat().st_size > MAX_METADATA_BYTES:
            raise ValueError("it is too large")
        return records.read(path, dict[str, Any])
    except OSError as error:
        raise ValueError(f"{path}: cannot be read; copy the checkpoint again") from error


def check_manifest(path: Path) -> None:
    """Check the length of a manifest of OCDBT. Raises ValueError if it is missing, damaged or truncated."""
    content = path.read_bytes() if path.is_file() else b""
    if content[:4] != MANIFEST_MAGIC or int.from_bytes(content[4:12], "little") != len(content):
        raise ValueError(f"{path}: is missing, damaged or truncated; copy the checkpoint again")
