"""Prompts read from a file, and captions read from a dataset."""

import hashlib
import io
from pathlib import Path
from typing import Any, TypedDict

from jobs.state import ledger
from pixart import records
from pixart.evaluation.reference import spaced

MAX_SHARDS_READ = 64  # of a dataset, for captions of all its parts
KEYS = ("text", "prompt")  # names of the prompt in a line of a .jsonl file


class Annotation(TypedDict):
    """A caption of an image."""

    id: int
    image_id: int
    caption: str


class Annotations(TypedDict):
    """The part of a COCO captions file that is read."""

    annotations: list[Annotation]


def read_prompts(file: str, flag: str = "--file") -> list[dict[str, str]]:
    """Return the prompts of a file with one per line; the lines of a .jsonl file hold them as "text" or "prompt".

    Each result has the key `prompt`, and `request` if the line has one. Raises ValueError if the file is empty, cannot
    be read, or has another format; errors name `flag`.
    """
    try:
        lines = Path(file).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {file}: {getattr(error, 'strerror', None) or error}") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    suffix = Path(file).suffix.lower()
    if suffix in (".json", ".csv", ".parquet"):
        raise ValueError(
            f"{flag} {file}: unsupported format; use a text file with one prompt per line, or a .jsonl file"
        )
    if suffix == ".jsonl":
        prompts = [read_line(line, f"{flag} {file}: line {number}") for number, line in numbered]
    else:
        prompts = [{"prompt": line} for _, line in numbered]
    if not prompts:
        raise ValueError(f"{flag} {file}: is empty; write one prompt per line")
    return prompts


def read_line(line: str, name: str) -> dict[str, str]:
    """Return the prompt of one line of a .jsonl file. Raises ValueError, naming `name`, if the line has no prompt."""
    value = records.parse(line, Any, name)
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


def spaced_captions(dataset: str, limit: int) -> list[str]:
    """Return at most `limit` captions of valid rows, evenly spaced over at most MAX_SHARDS_READ shards.

    A source is often sorted by class, so that its first captions alone would be of a few classes.
    """
    import pyarrow.parquet as pq

    available = sorted(ledger.shards(dataset, "caption"))
    shards = [available[index] for index in spaced(len(available), MAX_SHARDS_READ)] if available else []
    captions: list[str] = []
    for number, shard in enumerate(shards):
        (part,) = ledger.read_files(dataset, [f"captions/{shard:05d}.parquet"])
        rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(part or b""), columns=["caption", "valid"]).to_pylist()
        valid = [row["caption"] for row in rows if row["valid"]]
        wanted = limit * (number + 1) // len(shards) - len(captions)
        captions += [valid[row] for row in spaced(len(valid), wanted)] if valid and wanted else []
    return captions


def coco_captions(path: Path) -> list[str]:
    """Return one caption of each image of a COCO captions file, in an order that does not follow the images' numbers.

    The first caption of an image, by its number, is taken. Raises ValueError for a file of another form.
    """
    try:
        annotations = records.parse(path.read_bytes(), Annotations, f"--prompts {path}")["annotations"]
        first: dict[int, tuple[int, str]] = {}
        for item in annotations:
            candidate = (int(item["id"]), str(item["caption"]).strip())
            first[item["image_id"]] = min(first.get(item["image_id"], candidate), candidate)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or "is no file of COCO captions, with annotations"
        raise ValueError(f"--prompts {path}: {reason}; name captions_val2014.json, a .txt or a .jsonl file") from None
    if not first:
        raise ValueError(f"--prompts {path}: has no captions; name captions_val2014.json, a .txt or a .jsonl file")
    ordered = sorted(first, key=lambda image: hashlib.sha256(str(image).encode()).digest())
    return [first[image][1] for image in ordered]
