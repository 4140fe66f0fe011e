"""The ledger of a dataset: one entry per job and finished shard, written after the shard's data.

The entry of a shard is DATASET/ledger/JOB/00012.json. It exists only if all rows of the shard do. It is current only if
it was made from the dataset's manifest and from the present inputs.
"""

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from pixart import records
from pixart.atomic import write_atomically
from pixart.config.dataset import data_from_dict, is_url
from pixart.config.renamed_keys import rename_data
from pixart.records import Count
from pixart.relocation import home_of, present

MANIFEST = "manifest.json"
CONTENTS = "source.json"  # what was taken from the source and left out
ARRAYS = "latents.zarr"  # a folder
ENTRIES_OF = {"adopt": ("caption", "latents")}  # entries that a job writes, where their names are not its own
DATA_FOLDERS = {"caption": ("captions", ".parquet"), "latents": (f"{ARRAYS}/valid/c", "")}  # with the files' suffix
NAME = re.compile(r"([0-9]+)\.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """The record of one shard that a job has finished."""

    manifest: str  # hash of the dataset's manifest
    inputs: str  # SHA-256 of the shard's input data; "" if the input is the source
    rows: Count
    valid: Count
    checksum: str  # SHA-256 of the data
    seconds: float
    versions: dict[str, str]


class DatasetRecord(TypedDict):
    """The manifest of a dataset as far as the launcher reads it; see `pixart.data.manifest`."""

    format: Count
    hash: str
    data: dict[str, Any]
    images: Count
    rows_per_shard: Count
    class_names: list[str]
    latent_shape: tuple[Count, Count, Count]
    text_dim: Count
    models: dict[str, str]
    adopted: NotRequired[dict[str, Any]]
    captions_from: NotRequired["OriginRecord"]


class OriginRecord(TypedDict):
    """The dataset whose captions another one takes over."""

    path: str
    hash: str


class ContentsRecord(TypedDict):
    """What a dataset's source holds and leaves out; see `pixart.data.sources.contents`."""

    items: Count
    labelled: Count
    left_out: dict[str, Count]
    largest_label: int
    has_words: bool
    columns: dict[str, list[str]]


def path(dataset: str | Path, job: str, shard: int) -> Path:
    """Return the path of a shard's entry."""
    return Path(dataset) / "ledger" / job / f"{shard:05d}.json"


def record(dataset: str | Path, job: str, shard: int, entry: Entry) -> None:
    """Write an entry atomically. Call it after the shard's data is written."""
    write_atomically(path(dataset, job, shard), json.dumps(asdict(entry), indent=2) + "\n")


def read(dataset: str | Path, job: str, shard: int) -> Entry | None:
    """Return the entry of a shard; None if it is missing or damaged."""
    return entries(dataset, job, [shard]).get(shard)


def shards(dataset: str | Path, job: str) -> set[int]:
    """Return the shards that have an entry. Lists the folder once and reads no entry."""
    names = list_files(dataset, f"ledger/{job}")
    return {int(match[1]) for name in names if (match := NAME.fullmatch(name))}


def entries_of(kind: str) -> str:
    """Return the job under whose name a kind of job writes its last entry of a shard."""
    return ENTRIES_OF.get(kind, (kind,))[-1]


def written(dataset: str | Path, job: str) -> dict[int, float]:
    """Return when each entry of a job was written, in seconds since the epoch; nothing for a dataset at a URL."""
    if is_url(str(dataset)):
        return {}
    try:
        with os.scandir(Path(dataset, "ledger", job)) as files:
            return {int(match[1]): item.stat().st_mtime for item in files if (match := NAME.fullmatch(item.name))}
    except FileNotFoundError:
        return {}


def entries(dataset: str | Path, job: str, shards: list[int]) -> dict[int, Entry]:
    """Return the entries by shard, without those that are missing or damaged."""
    texts = read_files(dataset, [f"ledger/{job}/{shard:05d}.json" for shard in shards])
    entries_by_shard = {}
    for shard, text in zip(shards, texts, strict=True):
        with suppress(ValueError):
            if text is not None:
                entries_by_shard[shard] = records.parse(text, Entry, f"{dataset}/ledger/{job}/{shard:05d}.json")
    return entries_by_shard


def current(dataset: str | Path, job: str, shards: list[int], manifest: str) -> set[int]:
    """Return the shards whose entry is current: it has the hash `manifest`, and was made from the present inputs.

    An entry whose data no longer exists is not current.
    """
    inputs = dict.fromkeys(shards, "")
    if job == "latents":
        inputs = {shard: entry.checksum for shard, entry in entries(dataset, "caption", shards).items()}
    stored = entries(dataset, job, sorted(set(shards) & shards_with_data(dataset, job))).items()
    return {shard for shard, entry in stored if (entry.manifest, entry.inputs) == (manifest, inputs.get(shard))}


def shards_with_data(dataset: str | Path, job: str) -> set[int]:
    """Return the shards for which the file exists that the job writes last, by listing one folder."""
    folder, suffix = DATA_FOLDERS[job]
    if job == "latents" and read_files(dataset, [f"{ARRAYS}/zarr.json"]) == [None]:
        return set()
    names = (name.removesuffix(suffix) for name in list_files(dataset, folder) if name.endswith(suffix))
    return {int(name) for name in names if name.isascii() and name.isdecimal()}


def missing_shards(dataset: str | Path, job: str, manifest: Mapping[str, Any]) -> list[int]:
    """Return the shards that a job has not completed, for a dataset with this manifest."""
    shards = list(range(manifest["data"]["num_shards"]))
    complete = current(dataset, job, shards, manifest["hash"])
    return [shard for shard in shards if shard not in complete]


def require_complete(dataset: str | Path) -> None:
    """Raise ValueError unless the captions and latents of all shards of a dataset exist."""
    record = manifest(dataset)
    if record is None:
        raise ValueError(f"dataset {dataset} does not exist; run 'caption' to create it")
    for job in ("caption", "latents"):
        if missing := missing_shards(dataset, job, record):
            raise ValueError(incomplete(dataset, job, len(missing), record))


def incomplete(dataset: str | Path, job: str, missing: int, manifest: Mapping[str, Any]) -> str:
    """Return the error message about a dataset with this manifest that is not complete."""
    count = f"dataset {dataset} is incomplete: {missing} of {manifest['data']['num_shards']} shards"
    if is_adopted(manifest):
        return f"{count} are not adopted; run 'adopt {manifest['data']['source']}'"
    return f"{count} have no {job}; run '{job}'"


def is_adopted(manifest: Mapping[str, Any]) -> bool:
    """Return whether a dataset with this manifest was made from precomputed latents, by `adopt`."""
    return manifest["data"]["captioner"] == "adopted"


def drop_stale_entries(dataset: str | Path, job: str, shards: list[int], manifest: str) -> None:
    """Remove the entries of these shards that are not current, before the job processes the shards again."""
    for name in ENTRIES_OF.get(job, (job,)):
        for shard in set(shards) - current(dataset, name, shards, manifest):
            path(dataset, name, shard).unlink(missing_ok=True)


def captions(dataset: str | Path, shards: list[int]) -> dict[int, Entry]:
    """Return the caption job's entries of all these shards. Raises ValueError if some are missing."""
    available = entries(dataset, "caption", shards)
    if missing := [shard for shard in shards if shard not in available]:
        raise ValueError(
            f"{len(missing)} of {len(shards)} shards have no captions yet, such as {missing[0]}; run 'caption' first"
        )
    return available


def captions_origin(dataset: str | Path, manifest: Mapping[str, Any]) -> str:
    """Return the present path of the dataset whose captions a dataset with this manifest takes over."""
    path: str = present(manifest["captions_from"]["path"], home_of(Path(dataset)))
    return path


def captions_to_take_over(origin: str, origin_hash: str, shards: list[int]) -> dict[int, Entry]:
    """Return the caption job's entries of these shards in the dataset whose captions are taken over.

    Raises ValueError if it is no longer the dataset with the hash `origin_hash`, or if shards have no captions.
    """
    record = manifest(origin)
    if record is None or record["hash"] != origin_hash:
        raise ValueError(
            f"dataset {origin}: its hash is not {origin_hash}, so its captions cannot be reused; restore the dataset "
            "that they were taken from"
        )
    available = current(origin, "caption", shards, origin_hash)
    if missing := [shard for shard in shards if shard not in available]:
        raise ValueError(
            f"dataset {origin}: {len(missing)} of {len(shards)} shards have no captions to take over, such as "
            f"{missing[0]}; run 'caption --dataset {origin}' first"
        )
    return entries(origin, "caption", shards)


def manifest(dataset: str | Path) -> dict[str, Any] | None:
    """Return the dataset's manifest as plain values, without importing the data package; None if it is missing.

    Raises ValueError if it is damaged or of another version.
    """
    (text,) = read_files(dataset, [MANIFEST])
    if text is None:
        return None
    record = records.parse(text, DatasetRecord, f"{dataset}/{MANIFEST}")
    try:
        data = rename_data(record["data"])
        data_from_dict(data)
    except (TypeError, LookupError, ValueError) as error:
        raise ValueError(f"{dataset}/{MANIFEST}: is damaged or of another version, data: {error}; restore it") from None
    return {**record, "data": data}


def contents(dataset: str | Path) -> dict[str, Any] | None:
    """Return what a dataset's source holds and leaves out; None for one that was adopted or made before this record.

    Raises ValueError if the record is damaged.
    """
    (text,) = read_files(dataset, [CONTENTS])
    return None if text is None else records.parse(text, ContentsRecord, f"{dataset}/{CONTENTS}")


def read_files(dataset: str | Path, names: list[str]) -> list[bytes | None]:
    """Return the contents of files of a dataset's directory or URL; None for each that does not exist."""
    if is_url(str(dataset)):
        from pixart.data.storage import RemoteFiles

        return RemoteFiles(str(dataset)).read_files(names)
    contents: list[bytes | None] = []
    for name in names:
        try:
            with open(f"{dataset}/{name}", "rb") as file:  # noqa: PTH123 - a path object takes longer than the file
                contents.append(file.read())
        except FileNotFoundError:
            contents.append(None)
    return contents


def list_files(dataset: str | Path, folder: str) -> list[str]:
    """Return the names in a folder of a dataset's directory or URL; an empty list if the folder does not exist."""
    try:
        if is_url(str(dataset)):
            from pixart.data.storage import RemoteFiles

            return RemoteFiles(str(dataset)).list_folder(folder)
        return os.listdir(Path(dataset, folder))  # noqa: PTH208 - ten thousand names
    except FileNotFoundError:
        return []
