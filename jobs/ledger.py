"""What is done, judged from data: one entry per job and shard, written after the data itself.

An entry lies in DATASET/ledger/JOB/00012.json. It is there only if all of the shard's rows are, and it counts only
if it was made from the same manifest and the same inputs.
"""

import json
import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    manifest: str  # hash of the dataset's manifest
    inputs: str  # checksum of what the shard was made from; "" for the source itself
    rows: int
    valid: int
    checksum: str  # SHA-256 of the data
    seconds: float
    versions: dict[str, str]


def path(dataset: str | Path, job: str, shard: int) -> Path:
    return Path(dataset) / "ledger" / job / f"{shard:05d}.json"


def record(dataset: str | Path, job: str, shard: int, entry: Entry) -> None:
    """Writes an entry atomically; call it last."""
    write_atomically(path(dataset, job, shard), json.dumps(asdict(entry), indent=2) + "\n")


def read(dataset: str | Path, job: str, shard: int) -> Entry | None:
    try:
        return Entry(**json.loads(path(dataset, job, shard).read_text()))
    except FileNotFoundError:
        return None


def shards(dataset: str | Path, job: str) -> set[int]:
    """The shards that have an entry, unread: one listing, however many there are."""
    try:
        names = os.listdir(path(dataset, job, 0).parent)  # noqa: PTH208 - ten thousand names
    except FileNotFoundError:
        return set()
    return {int(name.removesuffix(".json")) for name in names if name.endswith(".json") and not name.startswith(".")}


def entries(dataset: str | Path, job: str, shards: list[int]) -> dict[int, Entry]:
    """The entries that are there, by shard."""
    found = {shard: read(dataset, job, shard) for shard in shards}
    return {shard: entry for shard, entry in found.items() if entry is not None}


def manifest(dataset: str | Path) -> dict[str, Any] | None:
    """The dataset's manifest as plain values, for a process that must not import what made it."""
    try:
        return json.loads((Path(dataset) / "manifest.json").read_text())
    except FileNotFoundError:
        return None


def write_atomically(target: Path, content: str | bytes) -> None:
    """Temporary name, fsync, rename: a reader sees all of it or none."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
