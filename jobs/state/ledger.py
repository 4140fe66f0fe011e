"""What is done, judged from data: one entry per job and shard, written after the data itself.

An entry lies in DATASET/ledger/JOB/00012.json. It is there only if all of the shard's rows are, and it counts only
if it was made from the same manifest and the same inputs.
"""

import json
import os
import re
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jobs.state.json_record import of_this_version, parse_record
from pixart.config.dataset import is_url
from pixart.config.renamed_keys import rename_data

MANIFEST = "manifest.json"
ARRAYS = "latents.zarr"  # a folder
NAME = re.compile(r"([0-9]+)\.json")


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
    return entries(dataset, job, [shard]).get(shard)


def shards(dataset: str | Path, job: str) -> set[int]:
    """The shards that have an entry, unread: one listing, however many there are."""
    names = list_files(dataset, f"ledger/{job}")
    return {int(found[1]) for name in names if (found := NAME.fullmatch(name))}


def entries(dataset: str | Path, job: str, shards: list[int]) -> dict[int, Entry]:
    """The entries that are there and whole, by shard."""
    found = read_files(dataset, [f"ledger/{job}/{shard:05d}.json" for shard in shards])
    whole = {}
    for shard, text in zip(shards, found, strict=True):
        with suppress(ValueError, TypeError):
            if text is not None:
                whole[shard] = Entry(**json.loads(text))
    return whole


def current(dataset: str | Path, job: str, shards: list[int], manifest: str) -> set[int]:
    """The shards whose entry counts: of this manifest's hash, and made from what their inputs are now."""
    inputs = dict.fromkeys(shards, "")
    if job == "latents":
        inputs = {shard: entry.checksum for shard, entry in entries(dataset, "caption", shards).items()}
    own = entries(dataset, job, shards).items()
    return {shard for shard, entry in own if (entry.manifest, entry.inputs) == (manifest, inputs.get(shard))}


def forget_others(dataset: str | Path, job: str, shards: list[int], manifest: str) -> None:
    """Takes away the entries of these shards that do not count, as their job is about to make them anew."""
    for shard in set(shards) - current(dataset, job, shards, manifest):
        path(dataset, job, shard).unlink(missing_ok=True)


def captions(dataset: str | Path, shards: list[int]) -> dict[int, Entry]:
    """The caption job's entries of all these shards. Raises ValueError where some are missing."""
    there = entries(dataset, "caption", shards)
    if missing := [shard for shard in shards if shard not in there]:
        raise ValueError(
            f"{len(missing)} of {len(shards)} shards have no captions yet, such as {missing[0]}: run caption first"
        )
    return there


def manifest(dataset: str | Path) -> dict[str, Any] | None:
    """The dataset's manifest as plain values, for a process that must not import what made it.

    None where there is none. Raises ValueError for a damaged one.
    """
    (text,) = read_files(dataset, [MANIFEST])
    if text is None:
        return None
    record = parse_record(text, f"{dataset}/{MANIFEST}", "data", "models", "images", "hash")
    with of_this_version(f"{dataset}/{MANIFEST}"):
        return {**record, "data": rename_data(record["data"])}


def read_files(dataset: str | Path, names: list[str]) -> list[bytes | None]:
    """Files of a dataset's directory or URL, None for those that are not there."""
    if is_url(str(dataset)):
        from pixart.data.storage import RemoteFiles

        return RemoteFiles(str(dataset)).read_files(names)
    contents: list[bytes | None] = []
    for name in names:
        try:
            contents.append(Path(dataset, name).read_bytes())
        except FileNotFoundError:
            contents.append(None)
    return contents


def list_files(dataset: str | Path, folder: str) -> list[str]:
    """Names in a folder of a dataset's directory or URL; none where there is no such folder."""
    try:
        if is_url(str(dataset)):
            from pixart.data.storage import RemoteFiles

            return RemoteFiles(str(dataset)).list_folder(folder)
        return os.listdir(Path(dataset, folder))  # noqa: PTH208 - ten thousand names
    except FileNotFoundError:
        return []


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
