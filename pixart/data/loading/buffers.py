"""Memory of the tensors that are loaded."""

import math
import weakref
from mmap import mmap

import numpy as np
import torch
from torch import Tensor

from pixart.data.store.zarr_store import Store

PIN_MEMORY = torch.cuda.is_available()


class BufferPool:
    """Allocates large tensors and reuses their memory once the last tensor that shares it is freed.

    Fresh memory costs more than reading data into it, as the kernel has to zero it and to look for huge pages, which
    numpy requests.
    """

    def __init__(self) -> None:
        self.free: dict[int, list[np.ndarray]] = {}  # by size in bytes

    def read(self, store: Store, name: str, rows: np.ndarray) -> Tensor:
        """Return rows of a column of a store, in pinned memory if CUDA is available."""
        values = self.column(store, name, len(rows))
        store.read(name, rows, values.numpy())
        return values

    def column(self, store: Store, name: str, rows: int) -> Tensor:
        """Return an uninitialized tensor for so many rows of a column, in pinned memory if CUDA is available."""
        shape, dtype = store.arrays[name]
        if PIN_MEMORY:  # torch has a caching allocator for pinned memory
            return torch.empty((rows, *shape), dtype=getattr(torch, dtype), pin_memory=True)
        return self.empty((rows, *shape), np.dtype(dtype))

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Tensor:
        """Return an uninitialized tensor."""
        needed = math.prod(shape) * dtype.itemsize
        size = 1 << max(12, (needed - 1).bit_length() - 3)
        size *= -(-needed // size)  # limits the number of distinct sizes, at a cost of at most an eighth
        free = self.free.setdefault(size, [])
        buffer = free.pop() if free else np.frombuffer(mmap(-1, size), np.uint8)
        values = buffer[:needed].view(dtype).reshape(shape)
        weakref.finalize(values, free.append, buffer).atexit = False
        return torch.from_numpy(values)


def pin(tensor: Tensor) -> Tensor:
    """Return the tensor in pinned memory if CUDA is available, else unchanged."""
    return tensor.pin_memory() if PIN_MEMORY else tensor
