"""Writing of one shard in blocks of rows, with a memory that does not depend on the length of the shard."""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import numpy as np

from pixart.data.manifest import Manifest
from pixart.data.store.layout import SUMS, VALID, ShardFile, columns_of, layout, row_digest, write_shard_file

MAX_PENDING = 3  # blocks that are written in the background
BYTES_PER_SYNC = 64 << 20


class ShardWriter:
    """Writes the arrays of one shard while further rows are being prepared, replacing those of an earlier attempt.

    The file of `valid` is deleted first and written last, by `commit`. Without it, no file of the shard gets its name.
    """

    def __init__(self, manifest: Manifest, shard: int) -> None:
        self.shard, self.root, self.columns = shard, Path(manifest.data.path), columns_of(manifest)
        self.names = sorted(layout(manifest))
        self._small: dict[str, list[np.ndarray]] = {name: [] for name in self.names if self.columns[name].chunk > 1}
        self._sums = np.zeros(self.columns[SUMS].shape)
        self._pending: list[Future[None]] = []
        self._unsynchronized = 0
        (self.root / self.columns[VALID].file(shard)).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._writer = stack.enter_context(ThreadPoolExecutor(1))
            large = [name for name in self.names if name not in self._small]
            self._files = {
                name: stack.enter_context(ShardFile(self.root, self.columns[name], self.shard)) for name in large
            }
            stack.callback(self._cancel)  # before the files are closed
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _cancel(self) -> None:
        for future in self._pending:
            future.cancel()
        self._writer.shutdown()

    def append(self, columns: dict[str, np.ndarray], sums: np.ndarray) -> None:
        """Take the next rows of all columns, which the caller must not change afterwards.

        `sums` are the moments of the valid latents, as `zarr_store.channel_sums` defines them. Raises what the writing
        of earlier rows has raised.
        """
        while len(self._pending) >= MAX_PENDING:
            self._pending.pop(0).result()
        self._sums += sums
        for name, blocks in self._small.items():
            blocks.append(columns[name])
        self._pending.append(self._writer.submit(self._write, columns))

    def _write(self, columns: dict[str, np.ndarray]) -> None:
        for name, file in self._files.items():
            file.append(columns[name])
            self._unsynchronized += columns[name].nbytes
        if self._unsynchronized >= BYTES_PER_SYNC:
            self._unsynchronized = 0
            for file in self._files.values():
                file.synchronize()

    def commit(self) -> dict[str, bytes]:
        """Finish the files of the shard, and return the `row_digest` of each column."""
        for future in self._pending:
            future.result()
        digests = {name: file.digest.digest() for name, file in self._files.items()}
        for file in self._files.values():
            file.commit()
        small = {name: np.concatenate(blocks, dtype=self.columns[name].dtype) for name, blocks in self._small.items()}
        for name in small.keys() - {VALID}:
            write_shard_file(self.root, self.columns[name], self.shard, small[name])
        write_shard_file(self.root, self.columns[SUMS], self.shard, self._sums[None])
        write_shard_file(self.root, self.columns[VALID], self.shard, small[VALID])
        return digests | {name: row_digest(values) for name, values in small.items()}
