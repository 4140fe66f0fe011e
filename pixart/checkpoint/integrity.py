"""Integrity checks of a checkpoint: file checksums, and names and shapes of tensors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c

from pixart.checkpoint.lazy_tensors import State
from pixart.model.dit import state_shapes

READ_SIZE = 1 << 24  # bytes per read


def length_and_crc32c(path: Path) -> tuple[int, int]:
    """Return a file's length in bytes and its CRC-32C."""
    length = crc = 0
    with path.open("rb") as file:
        while data := file.read(READ_SIZE):
            length, crc = length + len(data), google_crc32c.extend(crc, data)
    return length, crc


def check_files(folder: Path, expected: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError for a file of `folder` whose length or CRC-32C differs from `expected`, by file name."""
    for name, values in expected.items():
        file = folder / name
        if not file.exists() or list(length_and_crc32c(file)) != list(values):
            raise ValueError(f"{file}: missing, damaged or truncated; use another checkpoint")


def check_shapes(state: State, config: dict[str, Any], name: str) -> None:
    """Raise ValueError unless `state` has exactly the tensors and shapes of a DiT with this configuration."""
    expected = state_shapes(config)
    if missing := sorted(expected.keys() - state.keys()):
        raise ValueError(f"{name}: lacks {len(missing)} tensors of the model, for example {missing[0]}")
    if unknown := sorted(state.keys() - expected.keys()):
        raise ValueError(f"{name}: has {len(unknown)} tensors that the model does not have, for example {unknown[0]}")
    for key, shape in expected.items():
        if tuple(state[key].shape) != shape:
            raise ValueError(f"{name}: {key} has shape {tuple(state[key].shape)}; the model requires {shape}")
