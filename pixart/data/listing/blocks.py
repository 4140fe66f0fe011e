"""A compressed file of rows of JSON values, of which a range is read without the rows before it.

Blocks of BLOCK_ROWS rows follow each other, each compressed and with a CRC-32C in the index. The index stands at the
end, before its length and MAGIC; its SHA-256 identifies the file. Rows are written one after the other, and neither
writing nor reading holds more than a block in memory.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

import google_crc32c

from pixart import records
from pixart.records import Count

BLOCK_ROWS = 1024
MAGIC = b"pixart-listing-1"
LENGTH = 8  # bytes of the index's length
LEVEL = 3  # of the compression; higher ones save a tenth and take three times as long


class Writer:
    """Writer of the rows of a file that is open for writing; `finish` completes it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._lines: list[str] = []
        self._blocks: list[tuple[int, int]] = []  # bytes and CRC-32C
        self.rows = 0

    def add(self, row: Any) -> None:
        self._lines.append(json.dumps(row, separators=(",", ":")))
        self.rows += 1
        if len(self._lines) == BLOCK_ROWS:
            self._write_block()

    def finish(self, header: dict[str, Any]) -> None:
        """Write the last block and the index, which has the values of `header`."""
        if self._lines:
            self._write_block()
        index = zlib.compress(json.dumps({"rows": self.rows, "blocks": self._blocks, "header": header}).encode())
        self._file.write(index + len(index).to_bytes(LENGTH, "little") + MAGIC)
        self._file.flush()

    def _write_block(self) -> None:
        data = zlib.compress("\n".join(self._lines).encode(), LEVEL)
        self._file.write(data)
        self._blocks.append((len(data), google_crc32c.value(data)))
        self._lines.clear()


class IndexRecord(TypedDict):
    """The index of a file: its number of rows, the length and CRC-32C of each block, and the header."""

    rows: Count
    blocks: list[tuple[Count, Count]]
    header: dict[str, Any]


class Reader:
    """Reader of a finished file, which stays open. Raises ValueError if it is damaged."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        end = file.seek(0, 2) - LENGTH - len(MAGIC)
        file.seek(max(end, 0))
        tail = file.read()
        length = int.from_bytes(tail[:LENGTH], "little")
        if end < 0 or tail[LENGTH:] != MAGIC or length > end:
            raise self._damaged()
        file.seek(end - length)
        index = file.read(length)
        self.checksum = hashlib.sha256(index).hexdigest()
        try:
            content = records.parse(zlib.decompress(index), IndexRecord, name)
            self.rows: int = content["rows"]
            self.header: dict[str, Any] = content["header"]
            self._blocks: list[tuple[int, int, int]] = []  # offset, bytes and CRC-32C
            offset = 0
            for size, checksum in content["blocks"]:
                self._blocks.append((offset, size, checksum))
                offset += size
        except (ValueError, zlib.error):
            raise self._damaged() from None

    def read(self, start: int, stop: int) -> Iterator[Any]:
        """Yield rows start to stop - 1, or up to the last row."""
        stop = min(stop, self.rows)
        for block in range(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS) if start < stop else 0):
            first = block * BLOCK_ROWS
            lines = self._lines(block)
            for line in lines[max(start - first, 0) : stop - first]:
                yield json.loads(line)

    def _lines(self, block: int) -> list[str]:
        offset, size, checksum = self._blocks[block]
        data = os.pread(self._file.fileno(), size, offset)  # which threads may do at once
        if google_crc32c.value(data) != checksum:
            raise self._damaged()
        return zlib.decompress(data).decode().split("\n")

    def _damaged(self) -> ValueError:
        return ValueError(f"{self._name}: is damaged; restore it, or create another dataset")


def open_reader(path: Path) -> Reader:
    """Open a stored file. Raises ValueError if it is missing or damaged."""
    try:
        return Reader(path.open("rb"), str(path))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; restore it, or create another dataset") from None
