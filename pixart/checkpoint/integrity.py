"""Integrity checks of a checkpoint: file checksums, and names and shapes of tensors."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import google_crc32c

from pixart.checkpoint.lazy_tensors import State
from pixart.model.dit import state_shapes

READ_SIZE = 1 << 24  # bytes per read
ZERO_BYTE_MAP = [google_crc32c.extend(1 << bit, b"\0") ^ google_crc32c.extend(0, b"\0") for bit in range(32)]


def length_and_crc32c(path: Path) -> tuple[int, int]:
    """Return a file's length in bytes and its CRC-32C."""
    length = crc = 0
    with path.open("rb") as file:
        while data := file.read(READ_SIZE):
            length, crc = length + len(data), google_crc32c.extend(crc, data)
    return length, crc


def crc32c_of_concatenation(first: int, second: int, second_length: int) -> int:
    """Return the CRC-32C of A followed by B from those of A and of B, and the length of B in bytes.

    Appending n zeros is a linear map of the checksum's 32 bits, apart from a constant: the map of one zero is squared
    as often as n has binary digits.
    """
    shift, length = ZERO_BYTE_MAP, second_length
    while length:
        if length & 1:
            first = apply_map(shift, first)
        shift, length = [apply_map(shift, column) for column in shift], length >> 1
    return first ^ second


def apply_map(columns: Sequence[int], value: int) -> int:
    """Return a linear map of 32 bits, given by the images of the single bits, of a value."""
    return functools.reduce(lambda result, bit: result ^ columns[bit] * (value >> bit & 1), range(32), 0)


def check_files(folder: Path, expected: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError for a file of `folder` whose length or CRC-32C differs from `expected`, by file name."""
    for name, values in expected.items():
        file = folder / name
        if not file.is_file() or list(length_and_crc32c(file)) != list(values):
            raise ValueError(f"{file}: missing, damaged or truncated; use another checkpoint")


def list_files(folder: Path, known: Mapping[str, Sequence[int]], excluded: Sequence[str] = ()) -> dict[str, list[int]]:
    """Return the length and CRC-32C of every file of a folder by its path relative to it.

    `known` has those that need not be read again; `excluded` are names of files or folders at the top.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {
        name: list(known.get(name) or length_and_crc32c(path))
        for name, path in names.items()
        if name.partition("/")[0] not in excluded
    }


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
