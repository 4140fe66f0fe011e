"""The caption job: write a parquet part of captions for each shard, with one row per source item.

A dataset that has the images of another one at other sizes takes over its parts instead.
"""

import platform
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from jobs.state import ledger
from pixart.atomic import write_atomically


def run(dataset: str, shards: list[int]) -> None:
    """Caption shards one after the other; shards with a current ledger entry are skipped.

    Raises ValueError or RuntimeError at the end if a shard failed.
    """
    from pixart.data import manifest as manifests
    from pixart.data.captions.captioner import make_captioner

    manifest = manifests.read(dataset)
    data = manifest.data
    if manifest.captions_from:
        take_over(dataset, shards)
        return
    todo = [shard for shard in shards if not complete(dataset, manifest.hash, shard)]
    if not todo:
        return
    manifests.check_model(manifest, "captioner")
    source = manifests.open_images(manifest)
    captioner = make_captioner(data.captioner, model=data.caption_model, captions=data.captions)
    for_each_shard(todo, lambda shard: caption_shard(manifest, shard, source, captioner))


def complete(dataset: str, manifest_hash: str, shard: int) -> bool:
    """Return whether a shard's part exists and was made from the manifest with this hash."""
    entry = ledger.read(dataset, "caption", shard)
    return entry is not None and entry.manifest == manifest_hash and part_path(dataset, shard).exists()


def take_over(dataset: str, shards: list[int]) -> None:
    """Copy the caption parts of shards, and their ledger entries, from the dataset that the manifest names.

    Shards that have captions are skipped. Raises ValueError if that dataset lacks captions of another shard, or if a
    part of it does not match its ledger.
    """
    manifest = ledger.manifest(dataset)
    assert manifest is not None
    complete = ledger.current(dataset, "caption", shards, manifest["hash"])
    missing = [shard for shard in shards if shard not in complete]
    if not missing:
        return
    origin = ledger.captions_origin(dataset, manifest)
    entries = ledger.captions_to_take_over(origin, manifest["captions_from"]["hash"], missing)
    for shard in missing:
        begun = time.monotonic()
        read_part(origin, shard)  # compares it with its ledger entry
        write_atomically(part_path(dataset, shard), part_path(origin, shard).read_bytes())
        entry = replace(entries[shard], manifest=manifest["hash"], seconds=time.monotonic() - begun)
        ledger.record(dataset, "caption", shard, entry)


def part_path(dataset: str | Path, shard: int) -> Path:
    return Path(dataset) / "captions" / f"{shard:05d}.parquet"


def for_each_shard(shards: list[int], work: Callable[[int], None]) -> None:
    """Call `work` for every shard, continuing after a failure.

    At the end, raises ValueError if the first failure was one, RuntimeError for any other.
    """
    failures: dict[int, Exception] = {}
    for shard in shards:
        try:
            work(shard)
        except Exception as error:
            traceback.print_exc()
            failures[shard] = error
    if failures:
        first, cause = next(iter(failures.items()))
        kind = ValueError if isinstance(cause, ValueError) else RuntimeError
        raise kind(f"{len(failures)} of {len(shards)} shards failed; shard {first}: {cause}") from cause


def caption_shard(manifest, shard: int, source, captioner) -> None:
    """Write the part of one shard and its ledger entry.

    Raises ValueError if the source no longer has the shard's number of items.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pixart.data.captions.table import content_digest, make_part

    begun = time.monotonic()
    start, stop = manifest.shard_range(shard)
    table = make_part(source.read(start, stop), captioner, manifest.data.screening)
    if len(table) != stop - start:
        raise ValueError(
            f"shard {shard}: the source has {len(table)} of {stop - start} items and changed since 'init'; restore it"
        )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_atomically(part_path(manifest.data.path, shard), sink.getvalue().to_pybytes())
    ledger.record(
        manifest.data.path,
        "caption",
        shard,
        ledger.Entry(
            manifest=manifest.hash,
            inputs="",
            rows=len(table),
            valid=sum(table["valid"].to_pylist()),
            checksum=content_digest(table),
            seconds=time.monotonic() - begun,
            versions={"python": platform.python_version(), "captioner": captioner.name},
        ),
    )


def read_part(dataset: str | Path, shard: int):
    """Return the caption part of a shard as a pyarrow table.

    Raises ValueError if it is missing or damaged, or differs from the checksum in the ledger.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pixart.data.captions.table import content_digest

    entry, path = ledger.read(dataset, "caption", shard), part_path(dataset, shard)
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError):
        table = None
    if entry is None or table is None or content_digest(table) != entry.checksum:
        raise ValueError(
            f"{path}: does not match the ledger; run `python -m jobs.launch verify --dataset {dataset}`, which drops "
            "altered shards, then 'caption'"
        )
    return table
