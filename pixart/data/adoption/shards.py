"""The files of a source of precomputed latents, and the record of them that a dataset keeps.

One file is one shard: shard s of the dataset is the file with index s in the order of names.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from pixart import records
from pixart.config.dataset import MAX_SHARDS, is_url
from pixart.records import Count

TORCH_SUFFIX, ARRAY_RECORD_SUFFIX = ".pt", ".array_record"
SUFFIXES = (TORCH_SUFFIX, ARRAY_RECORD_SUFFIX)
ALLOWED = "name a folder of .pt or .array_record files, a pattern of them, or one such file"
RECORD_FILE = "source-shards.json"  # in the dataset's directory
NUM_SAMPLES, SAMPLE_BYTES = 16, 4096  # of a file's content that its hash covers, besides its size
NUM_THREADS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardRecord:
    """The identity of a source file when the dataset was created."""

    name: str
    bytes: Count
    rows: Count
    sampled_sha256: str  # of NUM_SAMPLES evenly spaced samples of SAMPLE_BYTES


def find_shards(source: str) -> list[Path]:
    """Return the shard files of a folder, of a pattern such as `latents/shard_*.pt`, or of one file, by name.

    Hidden files and files with other suffixes are skipped. Raises ValueError without a shard, or for both kinds.
    """
    if is_url(source):
        raise ValueError(f"source {source}: is a URL; copy the shards to a file system, where they can be mapped")
    path = Path(source)
    if path.is_dir():
        candidates = list(path.iterdir())
    elif any(wildcard in source for wildcard in "*?["):
        candidates = list(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    else:
        candidates = [path]
    shards = sorted(
        item for item in candidates if item.suffix in SUFFIXES and item.is_file() and not item.name.startswith(".")
    )
    if not shards:
        raise ValueError(f"source {source}: there are no shards; {ALLOWED}")
    if len({item.suffix for item in shards}) > 1:
        raise ValueError(f"source {source}: contains .pt and .array_record files; select one kind by a pattern")
    if len(shards) > MAX_SHARDS:
        raise ValueError(f"source {source}: has {len(shards)} shards; a dataset has at most {MAX_SHARDS}")
    return shards


def make_records(paths: list[Path], rows: list[int]) -> list[ShardRecord]:
    """Return the records of shard files that have the given numbers of rows."""
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        return list(threads.map(make_record, paths, rows))


def make_record(path: Path, rows: int) -> ShardRecord:
    """Return the record of one shard file."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        for index in range(NUM_SAMPLES):
            file.seek(max(0, size - SAMPLE_BYTES) * index // (NUM_SAMPLES - 1))
            digest.update(file.read(SAMPLE_BYTES))
    return ShardRecord(name=path.name, bytes=size, rows=rows, sampled_sha256=digest.hexdigest())


def to_json(shards: list[ShardRecord]) -> str:
    """Return the content of RECORD_FILE."""
    return json.dumps([asdict(record) for record in shards], indent=1) + "\n"


def digest(shards: list[ShardRecord]) -> str:
    """Return 16 hexadecimal digits that identify the shards."""
    return hashlib.sha256(to_json(shards).encode()).hexdigest()[:16]


def find_shard(source: str, dataset: str, shard: int) -> Path:
    """Return the file of one shard of a dataset.

    Raises ValueError if the files of the source, or the content of this one, have changed since the dataset was
    created.
    """
    record_file = Path(dataset) / RECORD_FILE
    try:
        known: list[ShardRecord] = records.read(record_file, list[ShardRecord])
    except OSError as error:
        raise ValueError(f"{record_file} cannot be read: {error}; adopt the shards into another dataset") from error
    paths = find_shards(source)
    if [path.name for path in paths] != [record.name for record in known]:
        raise ValueError(
            f"source {source}: has {len(paths)} shards, and other ones than the {len(known)} that the dataset "
            f"{dataset} was created from; restore them, or adopt them into another dataset"
        )
    if make_record(paths[shard], known[shard].rows) != known[shard]:
        raise ValueError(
            f"{paths[shard]}: has changed since the dataset {dataset} was created; restore it, or adopt the shards "
            "into another dataset"
        )
    return paths[shard]
