"""The adopt job: turn files of precomputed latents and captions into shards of a dataset, one file to one shard."""

import hashlib
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs.state import ledger
from jobs.tasks.caption import for_each_shard, part_path
from pixart.atomic import write_atomically
from pixart.config.recipe import from_json


def init(recipe: str, class_names: list[str], chosen: list[str]) -> None:
    """Create the dataset of a recipe, which is given as JSON, from the shards at its `data.source`.

    `chosen` names the keys of `data` that the user has set. Raises ValueError, with nothing written, for shards that
    cannot be adopted together, and if the VAE or the text encoder does not exist or does not fit them.
    """
    from pixart.data import manifest as manifests
    from pixart.data.adoption import new_dataset, shards
    from pixart.data.store import zarr_store

    data = from_json(recipe).data
    manifest, records = new_dataset.make(data, class_names, chosen)
    zarr_store.create(manifest)
    write_atomically(Path(data.path) / shards.RECORD_FILE, shards.to_json(records))
    manifests.write(manifest)


def run(dataset: str, shards: list[int]) -> None:
    """Adopt shards one after the other; shards with current ledger entries are skipped.

    Raises ValueError or RuntimeError at the end if a shard failed.
    """
    from pixart.data import manifest as manifests
    from pixart.data.adoption.rows import TextColumns
    from pixart.data.encoders.text_encoder import load_tokenizer
    from pixart.data.store.zarr_store import create

    manifest = manifests.read(dataset)
    complete = [ledger.current(dataset, job, shards, manifest.hash) for job in ledger.ENTRIES_OF["adopt"]]
    todo = [shard for shard in shards if not all(shard in done for done in complete)]
    if not todo:
        return
    manifests.check_model(manifest, "text_encoder")
    create(manifest)
    text = TextColumns(manifest, load_tokenizer(manifest.data.text_encoder))
    with one_torch_thread():
        for_each_shard(todo, lambda shard: adopt_shard(manifest, shard, text))


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Run torch's operations on one thread: they are small, and other threads write and decode meanwhile."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def adopt_shard(manifest, shard: int, text) -> None:
    """Write the arrays and captions of one shard, and its two ledger entries.

    Raises ValueError if the source has changed since the dataset was created, or if the file is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    import torch

    from pixart.data.adoption.open import open_shard
    from pixart.data.adoption.rows import PartLines, adopt_rows
    from pixart.data.adoption.shards import find_shard
    from pixart.data.captions.table import content_digest
    from pixart.data.store.shard_writer import ShardWriter

    begun, data = time.monotonic(), manifest.data
    source = open_shard(find_shard(data.source, data.path, shard))
    lines = PartLines()
    with ShardWriter(manifest, shard) as writer:
        for block in adopt_rows(manifest, source, text, lines):
            writer.append(block.columns, block.sums)
        digests = writer.commit()
    table = lines.table(source.path.name, manifest.models["captioner"])
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    write_atomically(part_path(data.path, shard), sink.getvalue().to_pybytes())
    rows, valid, caption_checksum = len(table), sum(table["valid"].to_pylist()), content_digest(table)
    common = {"manifest": manifest.hash, "rows": rows, "valid": valid, "seconds": time.monotonic() - begun}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "captioner": data.captioner}
    ledger.record(
        data.path, "caption", shard, ledger.Entry(inputs="", checksum=caption_checksum, versions=versions, **common)
    )
    ledger.record(
        data.path,
        "latents",
        shard,
        ledger.Entry(
            inputs=caption_checksum, checksum=combine(digests), versions={**versions, "vae": data.vae}, **common
        ),
    )
    print(f"shard {shard}: {valid} of {rows} rows of {source.path.name} are valid", flush=True)


def checksum(columns) -> str:
    """Return the checksum of an adopted shard's arrays."""
    from pixart.data.store.layout import row_digest

    return combine({name: row_digest(values) for name, values in columns.items()})


def combine(digests: dict[str, bytes]) -> str:
    """Return the SHA-256 over the `row_digest` of each column, in the order of their names."""
    return hashlib.sha256(b"".join(digests[name] for name in sorted(digests))).hexdigest()
