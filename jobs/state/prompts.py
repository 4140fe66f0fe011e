"""Prompts read from a file, and captions read from a dataset."""

import io
import json
from pathlib import Path
from typing import Any

from jobs.state import ledger

KEYS = ("text", "prompt")  # names of the prompt in a line of a .jsonl file


def read_prompts(file: str) -> list[dict[str, str]]:
    """Return the prompts of a file with one per line; the lines of a .jsonl file hold them as "text" or "prompt".

    Each result has the key `prompt`, and `request` if the line has one. Raises ValueError if the file is empty, cannot
    be read, or has another format.
    """
    try:
        lines = Path(file).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--file {file}: {getattr(error, 'strerror', None) or error}") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    suffix = Path(file).suffix.lower()
    if suffix in (".json", ".csv", ".parquet"):
        raise ValueError(
            f"--file {file}: unsupported format; use a text file with one prompt per line, or a .jsonl file"
        )
    if suffix == ".jsonl":
        prompts = [read_line(line, f"--file {file}: line {number}") for number, line in numbered]
    else:
        prompts = [{"prompt": line} for _, line in numbered]
    if not prompts:
        raise ValueError(f"--file {file}: is empty; write one prompt per line")
    return prompts


def read_line(line: str, name: str) -> dict[str, str]:
    """Return the prompt of one line of a .jsonl file. Raises ValueError, naming `name`, if the line has no prompt."""
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if not isinstance(value, dict) or not any(isinstance(value.get(key), str) for key in KEYS):
        raise ValueError(f'{name}: must be a JSON object with "text" or "prompt"')
    prompt = {"prompt": next(value[key] for key in KEYS if isinstance(value.get(key), str))}
    return {**prompt, "request": value["request"]} if isinstance(value.get("request"), str) else prompt


def dataset_captions(dataset: str, limit: int) -> list[str]:
    """Return the captions of the first `limit` valid rows, from the caption parts that exist."""
    import pyarrow.parquet as pq

    captions: list[str] = []
    for shard in sorted(ledger.shards(dataset, "caption")):
        (part,) = ledger.read_files(dataset, [f"captions/{shard:05d}.parquet"])
        rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(part or b""), columns=["caption", "valid"]).to_pylist()
        captions += [row["caption"] for row in rows if row["valid"]]
        if len(captions) >= limit:
            break
    return captions[:limit]
