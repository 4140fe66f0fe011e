"""Safetensors files that may be larger than memory, written tensor by tensor with direct I/O.

A copy into the page cache costs more CPU time than a fast disk takes to write, and evicts data that is about to be
read. Tensors are therefore copied to a buffer, which is written with O_DIRECT while the next one is filled.
"""

import ctypes
import errno
import fcntl
import json
import mmap
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pixart import records
from pixart.checkpoint.integrity import crc32c_of_concatenation
from pixart.records import Header

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8"}
DTYPES_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
BLOCK = mmap.PAGESIZE  # direct I/O requires offsets, lengths and memory addresses to be multiples of it
BUFFER = 1 << 24  # bytes
REFUSED = (errno.EINVAL, errno.EOPNOTSUPP)  # by a file system without direct I/O
# torch.equal takes several times as long, and even more if its threads compete with those of a GEMM.
MEMCMP = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ("memcmp", ctypes.CDLL(None))
)


def open_direct(path: Path, flags: int) -> int:
    """Open a file with O_DIRECT, or through the page cache on a file system without it, and return its descriptor."""
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        return os.open(path, flags, 0o666)


def transfer(call: Callable[..., int], descriptor: int, data: Any, offset: int) -> int:
    """Call os.pwrite or os.preadv on a file that `open_direct` opened, and return the number of bytes.

    Some file systems open a file with O_DIRECT and refuse to read or write it; it then goes through the page cache.
    """
    try:
        return call(descriptor, data, offset)
    except OSError as error:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        if error.errno not in REFUSED or not flags & os.O_DIRECT:
            raise
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        return call(descriptor, data, offset)


class DirectWriter:
    """Writer of a new file, from byte `offset` on, with two buffers: one is filled while the other is written.

    An error of a write is raised by the next flush or by `finish`.
    """

    def __init__(self, path: Path, offset: int) -> None:
        self.descriptor = open_direct(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.filling, self.writing = (mmap.mmap(-1, BUFFER) for _ in range(2))  # page-aligned
        self.offset, self.filled = offset, 0
        self.crc = 0  # of what was written since `offset`
        self.executor = ThreadPoolExecutor(1)
        self.pending: Future[Any] = self.executor.submit(int)  # nothing to wait for before the first write

    def append(self, values: Tensor) -> None:  # (bytes,), uint8
        """Copy bytes to the buffer and flush it whenever it is full."""
        while len(values):
            part = values[: BUFFER - self.filled]
            torch.frombuffer(self.filling, dtype=torch.uint8)[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            values = values[len(part) :]
            if self.filled == BUFFER:
                self.flush()

    def flush(self) -> None:
        """Wait for the previous write and start writing the buffer, up to the end of its last block."""
        self.pending.result()
        self.filling, self.writing = self.writing, self.filling
        self.pending = self.executor.submit(self.write, self.writing, self.filled, self.offset)
        self.offset, self.filled = self.offset + self.filled, 0

    def write(self, memory: mmap.mmap, size: int, offset: int) -> None:
        self.crc = google_crc32c.extend(self.crc, np.frombuffer(memory, np.uint8, size))
        remaining = memoryview(memory)[: size + -size % BLOCK]
        while remaining:
            written = transfer(os.pwrite, self.descriptor, remaining, offset)
            remaining, offset = remaining[written:], offset + written

    def finish(self, size: int) -> None:
        """Write the rest, truncate the file to `size` bytes and flush it to disk."""
        self.flush()
        self.pending.result()
        os.ftruncate(self.descriptor, size)
        os.fsync(self.descriptor)

    def close(self) -> None:
        self.executor.shutdown()
        os.close(self.descriptor)


def save_tensors(state: Mapping[str, Tensor], path: Path) -> tuple[int, int]:
    """Write a safetensors file: header length, header, tensors; one tensor at a time is in memory.

    Returns its length in bytes and its CRC-32C.

    The header precedes the tensors and is known after the last one only; space for it is reserved and padded.
    """
    header_size = 256 + sum(len(name) + 160 for name in state)
    header_size += -(header_size + 8) % BLOCK
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    file = DirectWriter(path, offset=8 + header_size)
    try:
        for name, tensor in state.items():
            values = as_bytes(tensor.detach().cpu())
            file.append(values)
            begin, end = end, end + len(values)
            entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        file.flush()
        file.pending.result()
        tensors_crc, file.crc = file.crc, 0
        header = json.dumps(entries, separators=(",", ":")).encode()
        assert len(header) <= header_size
        prefix = header_size.to_bytes(8, "little") + header.ljust(header_size)
        file.offset = 0
        file.append(torch.frombuffer(bytearray(prefix), dtype=torch.uint8))
        file.finish(8 + header_size + end)
        return 8 + header_size + end, crc32c_of_concatenation(file.crc, tensors_crc, end)
    finally:
        file.close()


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Load a safetensors file. Raises ValueError if it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read, it may be truncated: {error}") from error


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Memory-map the tensors of a file that `save_tensors` wrote; pages are read on access.

    safetensors' reader validates a file first and so reads all of it ahead.
    """
    content = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    return {
        name: content[begin:end].view(DTYPES_BY_NAME[dtype]).view(shape)
        for name, (dtype, shape, begin, end) in read_header(path).items()
    }


def read_header(path: Path) -> dict[str, tuple[str, list[int], int, int]]:
    """Return the dtype name, shape, and first and last byte offset in the file of each tensor, by name."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = records.parse(file.read(min(start, path.stat().st_size) - 8), Header, str(path))
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], entry["shape"], *(start + offset for offset in entry["data_offsets"]))
        for name, entry in header.items()
    }


def differing_tensors(path: Path, state: Mapping[str, Tensor]) -> list[str]:
    """Return the names of the tensors of `state` that a file does not contain bit for bit; read with direct I/O."""
    stored, different = read_header(path), []
    descriptor, buffer = open_direct(path, os.O_RDONLY), mmap.mmap(-1, BUFFER + BLOCK)
    try:
        for name, tensor in state.items():
            dtype, shape, offset, _ = stored.get(name, (None, None, 0, 0))
            equal = (dtype, shape) == (DTYPES.get(tensor.dtype), list(tensor.shape))
            for part in as_bytes(tensor).split(BUFFER) if equal else ():
                equal = equal and bytes_equal(descriptor, offset, part, buffer)
                offset += len(part)
            if not equal:
                different.append(name)
    finally:
        os.close(descriptor)
    return different


def bytes_equal(descriptor: int, offset: int, values: Tensor, buffer: mmap.mmap) -> bool:
    """Return whether a file has these bytes at `offset`; `buffer` holds at least one block more than `values`."""
    skip = offset % BLOCK
    size = skip + len(values)
    read = transfer(os.preadv, descriptor, [memoryview(buffer)[: size + -size % BLOCK]], offset - skip)
    stored = torch.frombuffer(buffer, dtype=torch.uint8)[skip:]
    return read >= size and not MEMCMP(stored.data_ptr(), values.data_ptr(), len(values))


def as_bytes(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor in row-major order as uint8 (bytes,)."""
    return tensor.contiguous().flatten().view(torch.uint8)
