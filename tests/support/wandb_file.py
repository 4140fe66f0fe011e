"""Reading of the `.wandb` file of an offline run: records in the log format of LevelDB, as wandb's own messages."""

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK_SIZE, HEADER = 32768, struct.Struct("<IHB")  # checksum, length, type of a chunk
FILE_HEADER_SIZE = 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def payloads(content: bytes) -> Iterator[bytes]:
    """Yield the records of a log; a record may be split into chunks, each within a block."""
    assert content[:4] == b":W&B"
    at, parts = FILE_HEADER_SIZE, []
    while at + HEADER.size <= len(content):
        left = BLOCK_SIZE - at % BLOCK_SIZE
        if left < HEADER.size:
            at += left
            continue
        checksum, length, kind = HEADER.unpack_from(content, at)
        chunk = content[at + HEADER.size : at + HEADER.size + length]
        assert checksum == zlib.crc32(bytes([kind]) + chunk)
        at += HEADER.size + length
        parts.append(chunk)
        if kind in (FULL, LAST):
            yield b"".join(parts)
            parts = []


def read(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the run's id, name, group and configuration, and the rows of its history."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("*.wandb")
    metadata: dict[str, Any] = {}
    history = []
    for payload in payloads(file.read_bytes()):
        record = Record()
        record.ParseFromString(payload)
        if record.HasField("run"):
            one = record.run
            metadata = {"id": one.run_id, "name": one.display_name, "group": one.run_group}
            metadata["config"] = {item.key: json.loads(item.value_json) for item in one.config.update}
        if record.HasField("history"):
            row = record.history.item
            history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row})
    return metadata, history
