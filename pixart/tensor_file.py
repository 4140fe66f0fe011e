"""Writing a safetensors file tensor by tensor, past the page cache.

A copy into the page cache costs a core more time than a fast disk takes to write, and drives out of memory what is
about to be read. So bytes gather in a buffer of our own, which the disk takes by itself (O_DIRECT).
"""

import errno
import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8"}
BLOCK = mmap.PAGESIZE  # what is written directly begins, ends and lies in memory at multiples of it
BUFFER = 1 << 24


class DirectFile:
    """A new file that grows by whole buffers; file systems without direct writing take the same by way of the cache."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self.descriptor = os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self.descriptor = os.open(path, flags, 0o666)
        self.memory = mmap.mmap(-1, BUFFER)  # begins with a page, as direct writing asks
        self.buffer = torch.frombuffer(self.memory, dtype=torch.uint8)
        self.filled = 0

    def append(self, values: Tensor) -> None:  # (bytes,), uint8
        while len(values):
            part = values[: BUFFER - self.filled]
            self.buffer[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            values = values[len(part) :]
            if self.filled == BUFFER:
                self.flush()

    def flush(self) -> None:
        """Writes what has gathered, up to the end of its last block."""
        left = memoryview(self.memory)[: self.filled + -self.filled % BLOCK]
        while left:
            left = left[os.write(self.descriptor, left) :]
        self.filled = 0

    def close(self) -> None:
        os.close(self.descriptor)


def save_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    """The safetensors format: the header's length, the header, the tensors, of which one at a time is in memory.

    The header comes first and is not known before the last tensor is, so room is left for it, filled up by spaces.
    """
    room = 256 + sum(len(name) + 160 for name in state)
    room += -(room + 8) % BLOCK
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    file = DirectFile(path)
    try:
        os.lseek(file.descriptor, 8 + room, os.SEEK_SET)
        for name, tensor in state.items():
            values = as_bytes(tensor.detach().cpu())
            file.append(values)
            begin, end = end, end + len(values)
            entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        file.flush()
        os.ftruncate(file.descriptor, 8 + room + end)
        header = json.dumps(entries, separators=(",", ":")).encode()
        assert len(header) <= room
        os.lseek(file.descriptor, 0, os.SEEK_SET)
        head = room.to_bytes(8, "little") + header.ljust(room)
        file.append(torch.frombuffer(bytearray(head), dtype=torch.uint8))
        file.flush()
        os.fsync(file.descriptor)
    finally:
        file.close()


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
