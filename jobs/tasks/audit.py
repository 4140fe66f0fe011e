"""The audit job: statistics of all caption parts on one page, and the verdict that training requires."""

import hashlib
import json
from pathlib import Path
from typing import Any, TypedDict

from jobs.state import ledger
from jobs.state.audit_files import DUPLICATES, FOLDER, PAGE, SUMMARY
from jobs.state.journal import Journal
from pixart import records
from pixart.atomic import write_atomically
from pixart.config import recipe as recipe_file

ACCEPTED = 24  # thumbnails of accepted images on the page
LARGE_PIXELS = 256  # of an image with its caption
GROUPS, OF_GROUP = 12, 4  # groups of duplicates on the page, thumbnails of each


class Check(TypedDict):
    """A check of an audit."""

    name: str
    passed: bool


class Summary(TypedDict):
    """The result of an audit, as far as training reads it."""

    manifest: str
    captions: str
    passed: bool
    checks: list[Check]


def run(run_folder: str) -> str:
    """Audit the dataset of the run's recipe, and return the path of the page.

    Raises ValueError if captions are missing or, after the audit's files are written, if a check fails.
    """
    from pixart.data import manifest as manifests
    from pixart.data.audit import statistics as audits
    from pixart.data.audit.page import page

    recipe = recipe_file.load(Path(run_folder) / "config.json")
    dataset = recipe.data.path
    manifest = manifests.read(dataset)
    captions_hash = captions_digest(dataset, manifest.data.num_shards)
    merged = merge(manifest)
    duplicates = merged.duplicates()
    summary = {"manifest": manifest.hash, "captions": captions_hash, **audits.summary(merged, duplicates, recipe.audit)}

    folder = Path(dataset) / FOLDER
    groups = [(kind, members[:OF_GROUP].tolist(), len(members)) for kind, members in spread(duplicates, GROUPS)]
    accepted = spread([row for rows in merged.valid_rows for row in rows.tolist()], ACCEPTED)
    adopted = adopted_rows(manifest, accepted) if manifest.adopted else None
    if adopted:
        accepted = []
    groups_rows = [row for _, rows, _ in groups for row in rows]
    lengths = [row for _, row in merged.by_length]
    middle = len(lengths) // 2
    extremes = {"Shortest captions": lengths[:middle], "Longest captions": lengths[middle:][::-1]}
    picture = pictures(manifest, groups_rows)
    large = {} if manifest.adopted else captioned(manifest, [*accepted, *lengths])
    html = page(
        dataset,
        summary,
        {
            reason: [(f"{example.id} {example.detail}", example.thumbnail) for example in merged.examples(reason)]
            for reason in merged.reasons
        },
        [large[row] for row in accepted],
        [(kind, count, [picture[row] for row in rows]) for kind, rows, count in groups],
        adopted,
        {name: [large[row] for row in rows] for name, rows in extremes.items()} if large else None,
    )
    write_duplicates(folder / DUPLICATES, duplicates)
    write_atomically(folder / PAGE, html)
    write_atomically(folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
    report(run_folder, folder, summary)
    failed = [check for check in summary["checks"] if not check["passed"]]
    if failed:
        failures = "; ".join(f"{check['name']} {check['value']:.4g}, limit {check['limit']}" for check in failed)
        raise ValueError(f"dataset {dataset}: failed its audit, {failures}; see {folder / PAGE}")
    return str(folder / PAGE)


def captions_digest(dataset: str | Path, shards: int) -> str:
    """Return the first 16 hex digits of the SHA-256 over the ledger's checksums of all caption parts.

    Raises ValueError if parts are missing.
    """
    entries = ledger.captions(dataset, list(range(shards)))
    return hashlib.sha256("".join(entries[shard].checksum for shard in range(shards)).encode()).hexdigest()[:16]


def require(dataset: str | Path) -> None:
    """Check that the dataset in its present state has passed its audit. Raises ValueError if it has not."""
    hint = f"run `python -m jobs.launch audit --dataset {dataset}`, or give --accept-failed-audit"
    manifest = ledger.manifest(dataset)
    assert manifest is not None
    (text,) = ledger.read_files(dataset, [f"{FOLDER}/{SUMMARY}"])
    if text is None:
        raise ValueError(f"dataset {dataset} has not been audited; {hint}")
    summary = records.parse(text, Summary, f"{dataset}/{FOLDER}/{SUMMARY}")
    now = captions_digest(dataset, manifest["data"]["num_shards"])
    if (summary["manifest"], summary["captions"]) != (manifest["hash"], now):
        raise ValueError(f"dataset {dataset} has changed since its audit; {hint}")
    if not summary["passed"]:
        failed = ", ".join(check["name"] for check in summary["checks"] if not check["passed"])
        raise ValueError(f"dataset {dataset} has failed its audit ({failed}, see its {FOLDER}/{PAGE}); {hint}")


def merge(manifest):
    """Return the audit of the caption parts of all shards."""
    from jobs.tasks.caption import read_part
    from pixart.data.audit.statistics import Audit

    merged = Audit(has_images=manifest.adopted is None)
    for shard in range(manifest.data.num_shards):
        merged.add(read_part(manifest.data.path, shard), manifest.shard_range(shard)[0])
    return merged


def spread(items: list, count: int) -> list:
    """Return at most `count` of the items, evenly spaced."""
    return [items[len(items) * index // count] for index in range(count)] if len(items) > count else items


def captioned(manifest, rows: list[int]) -> dict[int, tuple[str, bytes]]:
    """Return the id with the caption, and an image large enough to compare with it, of each row."""
    from jobs.tasks.caption import read_part

    images = pictures(manifest, rows, LARGE_PIXELS)
    texts: dict[int, str] = {}
    for shard in sorted({row // manifest.rows_per_shard for row in rows}):
        first = manifest.shard_range(shard)[0]
        captions = read_part(manifest.data.path, shard)["caption"]
        texts |= {row: captions[row - first].as_py() for row in rows if row // manifest.rows_per_shard == shard}
    return {row: (f"{name}: {texts[row] or 'no caption'}", image) for row, (name, image) in images.items()}


def pictures(manifest, rows: list[int], pixels: int = 64) -> dict[int, tuple[str, bytes]]:
    """Return the item id and encoded thumbnail of each row. The rows must have passed screening."""
    from pixart.data.images.screening import decode, thumbnail
    from pixart.data.manifest import open_images

    if not rows:
        return {}
    source = open_images(manifest)
    images = {}
    for row in rows:
        item = next(source.read(row, row + 1))
        images[row] = (item.id, thumbnail(decode(item.data, manifest.data.screening), pixels))
    return images


def adopted_rows(manifest, rows: list[int]):
    """Return the origin of an adopted dataset, with the captions of these rows, for the audit's page."""
    from jobs.tasks.caption import read_part
    from pixart.data.audit.page import AdoptedRows

    captions: list[tuple[str, str, str]] = []
    for shard in sorted({row // manifest.rows_per_shard for row in rows}):
        first = manifest.shard_range(shard)[0]
        table = read_part(manifest.data.path, shard).select(["id", "caption", "short_caption"])
        of_shard = [row - first for row in rows if row // manifest.rows_per_shard == shard]
        captions += [tuple(line.values()) for line in table.take(of_shard).to_pylist()]
    return AdoptedRows(source=manifest.data.source, form=manifest.adopted.form, captions=captions)


def write_duplicates(path: Path, duplicates) -> None:
    """Write a parquet table with one line for each row that has duplicates: kind, index of the group, row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = [(kind, group, int(row)) for group, (kind, rows) in enumerate(duplicates) for row in rows]
    schema = pa.schema([("kind", pa.string()), ("group", pa.int64()), ("row", pa.int64())])
    sink = pa.BufferOutputStream()
    columns = [pa.array([line[index] for line in lines], schema.types[index]) for index in range(len(schema))]
    pq.write_table(pa.table(columns, schema=schema), sink)
    write_atomically(path, sink.getvalue().to_pybytes())


def report(run_folder: str, folder: Path, summary: dict[str, Any]) -> None:
    """Write the summary's metrics, files and verdict to the journal of the run."""
    journal = Journal(run_folder)
    rows = max(1, summary["rows"])
    journal.metrics(0, {"data/rows": summary["rows"], "data/num_valid": summary["valid"]})
    journal.metrics(0, {f"data/{check['name'].replace(' ', '_')}": check["value"] for check in summary["checks"][:-1]})
    journal.metrics(0, {f"data/rejected_{name.replace(' ', '_')}": n / rows for name, n in summary["reasons"].items()})
    for name in (SUMMARY, PAGE, DUPLICATES):
        journal.artifact(folder / name)
    journal.tags({"pixart.audit": "PASS" if summary["passed"] else "FAIL", "pixart.dataset": summary["manifest"]})
