"""What is asked for in words: prompts of a file, captions of a dataset."""

import io
import json
from pathlib import Path
from typing import Any

from jobs.state import ledger

KEYS = ("text", "prompt")  # of a line of a .jsonl file


def read_prompts(file: str) -> list[dict[str, str]]:
    """One a line, of a .jsonl file its "text" or "prompt": `prompt`, and `request` where the line has one.

    Raises ValueError for a file without any, or one that cannot be read.
    """
    try:
        lines = Path(file).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--file {file}: {getattr(error, 'strerror', None) or error}") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    suffix = Path(file).suffix.lower()
    if suffix in (".json", ".csv", ".parquet"):
        raise ValueError(f"--file {file}: prompts are read from text, one a line, or from .jsonl")
    if suffix == ".jsonl":
        found = [read_line(line, f"--file {file}: line {number}") for number, line in numbered]
    else:
        found = [{"prompt": line} for _, line in numbered]
    if not found:
        raise ValueError(f"--file {file}: there is nothing in it")
    return found


def read_line(line: str, name: str) -> dict[str, str]:
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not any(isinstance(value.get(key), str) for key in KEYS):
        raise ValueError(f'{name} is no JSON object with "text" or "prompt"')
    found = {"prompt": next(value[key] for key in KEYS if isinstance(value.get(key), str))}
    return {**found, "request": value["request"]} if isinstance(value.get("request"), str) else found


def dataset_captions(dataset: str, limit: int) -> list[str]:
    """The first captions of valid rows, of the parts that are there."""
    import pyarrow.parquet as pq

    found: list[str] = []
    for shard in sorted(ledger.shards(dataset, "caption")):
        (part,) = ledger.read_files(dataset, [f"captions/{shard:05d}.parquet"])
        rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(part or b""), columns=["caption", "valid"]).to_pylist()
        found += [row["caption"] for row in rows if row["valid"]]
        if len(found) >= limit:
            break
    return found[:limit]
