"""The file layout of a dataset's arrays: Zarr v3, with one file per array and data shard.

Chunks are uncompressed and end with their CRC-32C. In a file of several chunks, they are stored in row order and
followed by the shard index, so that the offset of every row is known in advance. Every Zarr v3 library can read them.

A dataset with aspect buckets has an array of latents per bucket, which has chunks for the valid rows of its bucket
alone: they follow each other without gaps, and the shard index has no entry for the other rows. The column `bucket` has
the index of each row's bucket.
"""

import errno
import hashlib
import math
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import google_crc32c
import numpy as np

from pixart.atomic import remove_leftovers, temporary_path
from pixart.data.manifest import Manifest

ZARR_FOLDER = "latents.zarr"
VALID = "valid"
LATENTS = "latents"
BUCKET = "bucket"
SUMS = "channel_sums"  # per shard and channel: number, sum and sum of squares of the valid latent values
CRC_BYTES = 4  # of a CRC-32C
BLOCK = 32  # rows that are read together: 1 MiB of latents at 256 px
MAX_BUFFERS = 1000  # per vectored system call; IOV_MAX is 1024
MIN_SEGMENT_BYTES = 1 << 20  # fetched together from remote storage
MISSING_CHUNK = (1 << 64) - 1  # offset and size of a chunk that is not stored, in a shard index

Layout = dict[str, tuple[tuple[int, ...], str]]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One array. A file has `rows` rows, and a chunk has one row or all rows of a file.

    With `bucket`, only the valid rows of that aspect bucket have chunks.
    """

    name: str
    shape: tuple[int, ...]  # of one row
    dtype: str
    rows: int
    chunk: int  # rows
    bucket: int | None = None

    @cached_property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @cached_property
    def stride(self) -> int:
        """Bytes of a chunk with its checksum."""
        return self.row_bytes * self.chunk + CRC_BYTES

    @property
    def segment_size(self) -> int:
        """Bytes of a file that are fetched together from remote storage, a multiple of a block."""
        block = BLOCK * self.stride if self.chunk == 1 else self.stride
        return -(-MIN_SEGMENT_BYTES // block) * block

    def index(self, stored: np.ndarray | None = None) -> bytes:
        """Return the shard index: offset and size of every chunk, and its checksum; b"" for a file of a single chunk.

        `stored` are the rows of the file that have a chunk, ascending; without it all have one.
        """
        if self.chunk == self.rows:
            return b""
        stored = np.arange(self.rows) if stored is None else stored
        table = np.full((self.rows, 2), MISSING_CHUNK, "<u8")
        table[stored, 0] = self.stride * np.arange(len(stored), dtype="<u8")
        table[stored, 1] = self.stride
        return table.tobytes() + crc32c(table)

    def span(self, chunk: int, chunks: int) -> tuple[int, int]:
        """Return the first byte and the end of the block that contains a chunk, in a file of so many chunks."""
        first, stop = chunk // BLOCK * BLOCK, min((chunk // BLOCK + 1) * BLOCK, chunks)
        return (0, self.stride) if self.chunk > 1 else (first * self.stride, stop * self.stride)

    def file(self, shard: int) -> str:
        """Return the file name of a shard, relative to the dataset's directory."""
        return f"{ZARR_FOLDER}/{self.name}/c/{shard}" + "/0" * len(self.shape)


def crc32c(data: bytes | np.ndarray) -> bytes:
    """Return the CRC-32C of data as 4 little-endian bytes."""
    return google_crc32c.value(data).to_bytes(CRC_BYTES, "little")


def row_digest(values: np.ndarray) -> bytes:
    """Return a SHA-256 of a column (B, ...): over the CRC-32C of each row, which the file holds, or over scalars.

    It takes a fraction of the time of a SHA-256 over all values.
    """
    if values.ndim == 1:
        return hashlib.sha256(values.data).digest()
    rows = np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)
    return hashlib.sha256(b"".join(crc32c(row) for row in rows)).digest()


def layout(manifest: Manifest) -> Layout:
    """Return the shape of one row and the dtype of every array of a dataset."""
    data = manifest.data
    arrays: Layout = {name: (shape, "float16") for name, shape in latents_of(manifest).items()}
    arrays["label"] = ((), "int32")
    if manifest.buckets:
        arrays[BUCKET] = ((), "int16")
    for prefix in ("", "short_") if data.short_captions else ("",):
        arrays[f"{prefix}token_ids"] = ((data.max_text_tokens,), "int32")
        arrays[f"{prefix}token_mask"] = ((data.max_text_tokens,), "bool")
        if data.store_text_embeddings:
            arrays[f"{prefix}text_states"] = ((data.max_text_tokens, manifest.text_dim), "float16")
    return {**arrays, VALID: ((), "bool")}


def latents_of(manifest: Manifest) -> dict[str, tuple[int, int, int]]:
    """Return the shapes of the arrays of latents by name: one per aspect bucket, or `latents` alone."""
    if not manifest.buckets:
        return {LATENTS: manifest.latent_shape}
    return {f"{LATENTS}_{height}x{width}": (depth, height, width) for depth, height, width in manifest.latent_shapes}


def columns_of(manifest: Manifest) -> dict[str, Column]:
    """Return the columns of a dataset by name: the arrays of `layout`, and the sums per channel."""
    rows = manifest.rows_per_shard
    buckets = {name: index for index, name in enumerate(latents_of(manifest))} if manifest.buckets else {}
    columns = {
        name: Column(
            name=name, shape=shape, dtype=dtype, rows=rows, chunk=1 if shape else rows, bucket=buckets.get(name)
        )
        for name, (shape, dtype) in layout(manifest).items()
    }
    shape = (1 + 2 * manifest.latent_shape[0],)
    return {**columns, SUMS: Column(name=SUMS, shape=shape, dtype="float64", rows=1, chunk=1)}


def create(manifest: Manifest) -> None:
    """Create the empty Zarr arrays of a dataset; existing arrays are not changed.

    They are created under a temporary name and renamed, so that any number of processes may do so at once.
    """
    folder = Path(manifest.data.path) / ZARR_FOLDER
    names = ["", *columns_of(manifest)]
    missing = [name for name in names if not (folder / name / "zarr.json").exists()]
    if not missing:
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(folder)
    try:
        create_arrays(temporary, manifest)
        for name in missing:
            with suppress(OSError):  # another process has renamed its own
                (temporary / name).replace(folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def create_arrays(folder: Path, manifest: Manifest) -> None:
    """Create a Zarr group with the empty arrays of a dataset."""
    import zarr
    from zarr.codecs import Crc32cCodec

    group = zarr.open_group(folder, mode="w-")
    for name, column in columns_of(manifest).items():
        group.create_array(
            name,
            shape=(column.rows * manifest.data.num_shards, *column.shape),
            dtype=column.dtype,
            chunks=(column.chunk, *column.shape),
            shards=(column.rows, *column.shape) if column.chunk < column.rows else None,
            compressors=Crc32cCodec(),
            fill_value=0,
        )


def write_shard_file(
    root: Path, column: Column, shard: int, values: np.ndarray, stored: np.ndarray | None = None
) -> None:
    """Write the file of one column and shard atomically.

    `values` (B, ...) are those of the first B rows, after which zeros follow, or of the rows `stored` (B,) of the file,
    ascending. Without such rows there is no file.
    """
    if stored is not None and len(stored) == 0:
        (root / column.file(shard)).unlink(missing_ok=True)
        return
    with ShardFile(root, column, shard) as file:
        file.append(values)
        file.commit(stored)


class ShardFile:
    """The file of one column and shard while it is written in blocks of consecutive rows.

    The file gets its name by `commit`. Without it, nothing is left at the end of the context.
    """

    def __init__(self, root: Path, column: Column, shard: int) -> None:
        self.column, self.target = column, root / column.file(shard)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.target)
        self.temporary = temporary_path(self.target)
        self.rows, self.digest = 0, hashlib.sha256()  # of the CRC-32C of every chunk that was appended
        self._file = self.temporary.open("wb", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.temporary.unlink(missing_ok=True)

    def append(self, values: np.ndarray) -> None:
        """Write the next rows, (B, ...). A file of a single chunk takes all of its rows at once."""
        column = self.column
        self.rows += len(values)
        data = np.ascontiguousarray(values, column.dtype).reshape(-1).view(np.uint8)
        if column.chunk > 1 and (missing := column.chunk * column.row_bytes - len(data)):
            data = np.concatenate([data, np.zeros(missing, np.uint8)])
            self.rows = column.rows
        chunks = data.reshape(-1, column.stride - CRC_BYTES)
        checksums = [crc32c(chunk) for chunk in chunks]
        self.digest.update(b"".join(checksums))
        self._write([part for pair in zip(chunks, checksums, strict=True) for part in pair])

    def synchronize(self) -> None:
        """Flush the written data to the disk, so that `commit` has less to flush."""
        os.fdatasync(self._file.fileno())

    def commit(self, stored: np.ndarray | None = None) -> None:
        """Write the shard index, flush the file to the disk and rename it to its final name.

        The values that were appended are those of the rows `stored` of the file, or of the first ones, after which
        zeros follow.
        """
        if stored is None:
            zeros = np.zeros(self.column.row_bytes, np.uint8)
            self._write([zeros, crc32c(zeros)] * (self.column.rows - self.rows))
        self._write([self.column.index(stored)])
        os.fsync(self._file.fileno())
        self.temporary.replace(self.target)

    def _write(self, parts: list[Any]) -> None:
        """Write buffers by vectored system calls. Raises OSError if the disk is full."""
        for start in range(0, len(parts), MAX_BUFFERS):
            group = parts[start : start + MAX_BUFFERS]
            if os.writev(self._file.fileno(), group) < sum(len(part) for part in group):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.target))
