"""The arrays of a dataset as files: Zarr v3, a file for each data shard, its rows one after the other.

Chunks are not compressed and end in their CRC-32C; in a file of several chunks they lie in the order of the rows and
the index ends the file, so that the place of every row is known beforehand. Any library for Zarr v3 reads them too.
"""

import errno
import math
import os
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

from pixart.data.manifest import Manifest

FILE = "latents.zarr"
VALID = "valid"
SUMS = "channel_sums"  # per shard: count, sums and sums of squares of the valid latents by channel
CHECKSUM = 4  # bytes
BLOCK = 32  # rows, 1 MiB of latents at 256 px
BUFFERS = 1000  # that one system call is given; IOV_MAX is 1024
PIECE = 1 << 20  # bytes that are fetched together at least, where a file has them

Layout = dict[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One array; a file has `rows` rows, a chunk one of them or all."""

    name: str
    shape: tuple[int, ...]  # of one row
    dtype: str
    rows: int
    chunk: int

    @cached_property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @cached_property
    def stride(self) -> int:
        """Bytes of a chunk and its checksum."""
        return self.row_bytes * self.chunk + CHECKSUM

    @property
    def piece(self) -> int:
        """Bytes of a file that are fetched together: whole blocks of rows."""
        block = BLOCK * self.stride if self.chunk == 1 else self.stride
        return -(-PIECE // block) * block

    @property
    def index(self) -> bytes:
        """The end of a file of several chunks: place and length of each, and the checksum of these."""
        if self.chunk == self.rows:
            return b""
        table = np.full((self.rows, 2), self.stride, "<u8")
        table[:, 0] *= np.arange(self.rows, dtype="<u8")
        return table.tobytes() + checksum(table)

    def span(self, row: int) -> tuple[int, int]:
        """First and end byte of the block of a row of a file."""
        first, stop = row // BLOCK * BLOCK, min((row // BLOCK + 1) * BLOCK, self.rows)
        return (0, self.stride) if self.chunk > 1 else (first * self.stride, stop * self.stride)

    def file(self, shard: int) -> str:
        return f"{FILE}/{self.name}/c/{shard}" + "/0" * len(self.shape)


def checksum(data: bytes | np.ndarray) -> bytes:
    return google_crc32c.value(data).to_bytes(CHECKSUM, "little")


def layout(manifest: Manifest) -> Layout:
    """Array name -> shape of one row and dtype."""
    data = manifest.data
    arrays: Layout = {"latents": (manifest.latent_shape, "float16"), "label": ((), "int32")}
    for prefix in ("", "short_") if data.short_captions else ("",):
        arrays[f"{prefix}token_ids"] = ((data.max_text_tokens,), "int32")
        arrays[f"{prefix}token_mask"] = ((data.max_text_tokens,), "bool")
        if data.store_text_embeddings:
            arrays[f"{prefix}text_states"] = ((data.max_text_tokens, manifest.text_dim), "float16")
    return {**arrays, VALID: ((), "bool")}


def columns_of(manifest: Manifest) -> dict[str, Column]:
    """What lies on the disk, by name: the arrays of `layout`, and the sums."""
    rows = manifest.rows_per_shard
    made = {
        name: Column(name=name, shape=shape, dtype=dtype, rows=rows, chunk=1 if shape else rows)
        for name, (shape, dtype) in layout(manifest).items()
    }
    sums = (1 + 2 * manifest.latent_shape[0],)
    return {**made, SUMS: Column(name=SUMS, shape=sums, dtype="float64", rows=1, chunk=1)}


def create(manifest: Manifest) -> None:
    """Makes the empty arrays; those that are there are left as they are."""
    import zarr
    from zarr.codecs import Crc32cCodec

    group = zarr.open_group(Path(manifest.data.path) / FILE, mode="a")
    for name, column in columns_of(manifest).items():
        if name not in group:
            group.create_array(
                name,
                shape=(column.rows * manifest.data.num_shards, *column.shape),
                dtype=column.dtype,
                chunks=(column.chunk, *column.shape),
                shards=(column.rows, *column.shape) if column.chunk < column.rows else None,
                compressors=Crc32cCodec(),
                fill_value=0,
            )


def write_file(root: Path, column: Column, shard: int, values: np.ndarray) -> None:
    """One file, whole or not at all; rows that `values` lacks are zeros."""
    data = np.ascontiguousarray(values, column.dtype).reshape(-1).view(np.uint8)
    if missing := column.rows * column.row_bytes - len(data):
        data = np.concatenate([data, np.zeros(missing, np.uint8)])
    chunks = data.reshape(-1, column.stride - CHECKSUM)
    parts: list[Any] = [part for chunk in chunks for part in (chunk, checksum(chunk))]
    parts.append(column.index)
    target = root / column.file(shard)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb", buffering=0) as file:
            for start in range(0, len(parts), BUFFERS):
                group = parts[start : start + BUFFERS]
                if os.writev(file.fileno(), group) < sum(len(part) for part in group):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
