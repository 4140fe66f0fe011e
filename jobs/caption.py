"""The caption job: one shard of images to one parquet part of captions, every source item a row."""

import io
import platform
import re
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from jobs import ledger


def run(dataset: str, shards: list[int]) -> None:
    """Captions shards one after the other; those that the ledger has are left alone."""
    from pixart.data import manifest as manifests
    from pixart.data.captioner import make_captioner

    manifest = manifests.read(dataset)
    data = manifest.data
    todo = [shard for shard in shards if not complete(dataset, manifest.hash, shard)]
    if not todo:
        return
    source = manifests.open_images(manifest)
    captioner = make_captioner(data.captioner, model=data.caption_model)
    for_each_shard(todo, lambda shard: caption_shard(manifest, shard, source, captioner))


def complete(dataset: str, manifest_hash: str, shard: int) -> bool:
    entry = ledger.read(dataset, "caption", shard)
    return entry is not None and entry.manifest == manifest_hash and part_path(dataset, shard).exists()


def part_path(dataset: str | Path, shard: int) -> Path:
    return Path(dataset) / "captions" / f"{shard:05d}.parquet"


def for_each_shard(shards: list[int], work: Callable[[int], None]) -> None:
    """One failing shard does not keep the others from being done; raises the first error at the end."""
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


def first_sentence(text: str) -> str:
    return re.split(r"(?<=[.!?])\s", text.strip(), maxsplit=1)[0]


def caption_shard(manifest, shard: int, source, captioner) -> None:
    import hashlib

    import pyarrow as pa
    import pyarrow.parquet as pq

    from pixart.data.screening import Rejected, decode

    begun = time.monotonic()
    start, stop = manifest.shard(shard)
    columns: dict[str, list] = {name: [] for name in ("id", "label", "caption", "short_caption", "valid", "reason")}
    waiting: list[tuple[int, object, object]] = []  # (row of the shard, image, item) not captioned yet

    def caption_waiting() -> None:
        if waiting:
            texts = captioner.caption([image for _, image, _ in waiting], [item for _, _, item in waiting])
            for (row, _, _), text in zip(waiting, texts, strict=True):
                columns["caption"][row] = text
                columns["short_caption"][row] = first_sentence(text)
            waiting.clear()

    for row, item in enumerate(source.read(start, stop)):
        columns["id"].append(item.id)
        columns["label"].append(item.label)
        columns["caption"].append("")
        columns["short_caption"].append("")
        try:
            waiting.append((row, decode(item.data), item))
            columns["reason"].append("")
        except Rejected as rejected:
            columns["reason"].append(str(rejected))
        columns["valid"].append(not columns["reason"][-1])
        if len(waiting) == manifest.data.caption_batch:
            caption_waiting()
    caption_waiting()

    rows = len(columns["id"])
    if rows != stop - start:
        raise ValueError(f"shard {shard}: the source gave {rows} of {stop - start} items; it has changed since `init`")
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("label", pa.int32()),
            ("caption", pa.string()),
            ("short_caption", pa.string()),
            ("valid", pa.bool_()),
            ("reason", pa.string()),
        ]
    )
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), buffer)
    ledger.write_atomically(part_path(manifest.data.path, shard), buffer.getvalue())
    ledger.record(
        manifest.data.path,
        "caption",
        shard,
        ledger.Entry(
            manifest=manifest.hash,
            inputs="",
            rows=rows,
            valid=sum(columns["valid"]),
            checksum=hashlib.sha256(buffer.getvalue()).hexdigest(),
            seconds=time.monotonic() - begun,
            versions={"python": platform.python_version(), "captioner": captioner.name},
        ),
    )
