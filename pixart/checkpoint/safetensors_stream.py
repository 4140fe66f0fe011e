"""Files of tensors, safetensors' format, that may be larger than memory: written tensor by tensor, past the page cache.

A copy into the page cache costs a core more time than a fast disk takes to write, and drives out of memory what is
about to be read. So bytes gather in a buffer of our own, which the disk takes by itself (O_DIRECT), while the next
bytes gather in another.
"""

import ctypes
import errno
import json
import mmap
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8"}
BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
BLOCK = mmap.PAGESIZE  # what is written directly begins, ends and lies in memory at multiples of it
BUFFER = 1 << 24
# torch.equal takes several times as long, and more where its threads wait for those of a product.
MEMCMP = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ("memcmp", ctypes.CDLL(None))
)


def open_directly(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)


class DirectFile:
    """A new file, written from `place` on by whole buffers; where the file system has no direct writing, by its cache.

    What a write raises, the next one or `finish` does.
    """

    def __init__(self, path: Path, place: int) -> None:
        self.descriptor = open_directly(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self.filling, self.writing = (mmap.mmap(-1, BUFFER) for _ in range(2))  # each begins with a page
        self.place, self.filled = place, 0
        self.writer = ThreadPoolExecutor(1)
        self.written: Future[Any] = self.writer.submit(int)  # there is none before the first

    def append(self, values: Tensor) -> None:  # (bytes,), uint8
        while len(values):
            part = values[: BUFFER - self.filled]
            torch.frombuffer(self.filling, dtype=torch.uint8)[self.filled : self.filled + len(part)] = part
            self.filled += len(part)
            values = values[len(part) :]
            if self.filled == BUFFER:
                self.flush()

    def flush(self) -> None:
        """Begins to write what has gathered, up to the end of its last block, once what was before is written."""
        self.written.result()
        self.filling, self.writing = self.writing, self.filling
        self.written = self.writer.submit(self.write, self.writing, self.filled, self.place)
        self.place, self.filled = self.place + self.filled, 0

    def write(self, memory: mmap.mmap, size: int, place: int) -> None:
        left = memoryview(memory)[: size + -size % BLOCK]
        while left:
            done = os.pwrite(self.descriptor, left, place)
            left, place = left[done:], place + done

    def finish(self, size: int) -> None:
        """The file is of `size` bytes and on the disk."""
        self.flush()
        self.written.result()
        os.ftruncate(self.descriptor, size)
        os.fsync(self.descriptor)

    def close(self) -> None:
        self.writer.shutdown()
        os.close(self.descriptor)


def save_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    """The safetensors format: the header's length, the header, the tensors, of which one at a time is in memory.

    The header comes first and is not known before the last tensor is, so room is left for it, filled up by spaces.
    """
    room = 256 + sum(len(name) + 160 for name in state)
    room += -(room + 8) % BLOCK
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    file = DirectFile(path, place=8 + room)
    try:
        for name, tensor in state.items():
            values = as_bytes(tensor.detach().cpu())
            file.append(values)
            begin, end = end, end + len(values)
            entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        file.flush()
        header = json.dumps(entries, separators=(",", ":")).encode()
        assert len(header) <= room
        head = room.to_bytes(8, "little") + header.ljust(room)
        file.place = 0
        file.append(torch.frombuffer(bytearray(head), dtype=torch.uint8))
        file.finish(8 + room + end)
    finally:
        file.close()


def map_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of `save_tensors`, of which nothing is read before it is used.

    safetensors' own reader, which checks a file first, reads all of it ahead.
    """
    content = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
    return {
        name: content[begin:end].view(BY_NAME[dtype]).view(shape)
        for name, (dtype, shape, begin, end) in entries(path).items()
    }


def entries(path: Path) -> dict[str, tuple[str, list[int], int, int]]:
    """By name the dtype's name, the shape, and where in the file its bytes begin and end."""
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
    del header["__metadata__"]
    return {
        name: (entry["dtype"], entry["shape"], *(start + place for place in entry["data_offsets"]))
        for name, entry in header.items()
    }


def differing(path: Path, state: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that a file of `save_tensors` has not with these bits; it is read past the page cache."""
    stored, found = entries(path), []
    descriptor, buffer = open_directly(path, os.O_RDONLY), mmap.mmap(-1, BUFFER + BLOCK)
    try:
        for name, tensor in state.items():
            dtype, shape, place, _ = stored.get(name, (None, None, 0, 0))
            same = (dtype, shape) == (DTYPES.get(tensor.dtype), list(tensor.shape))
            for part in as_bytes(tensor).split(BUFFER) if same else ():
                same = same and is_at(descriptor, place, part, buffer)
                place += len(part)
            if not same:
                found.append(name)
    finally:
        os.close(descriptor)
    return found


def is_at(descriptor: int, place: int, values: Tensor, buffer: mmap.mmap) -> bool:
    """Whether a file has just these bytes there, read by way of a buffer with room for a block more."""
    before = place % BLOCK
    size = before + len(values)
    read = os.preadv(descriptor, [memoryview(buffer)[: size + -size % BLOCK]], place - before)
    there = torch.frombuffer(buffer, dtype=torch.uint8)[before:]
    return read >= size and not MEMCMP(there.data_ptr(), values.data_ptr(), len(values))


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
