"""The small JSON files that runs, checkpoints and datasets are known by; a damaged one is an error that names it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def of_this_version(path: Path | str) -> Iterator[None]:
    """For what is made of a record's fields: raises ValueError where they are others."""
    try:
        yield
    except (TypeError, LookupError) as error:
        raise ValueError(f"{path} is of another version: {error}") from None


def read_record(path: Path, *keys: str) -> dict[str, Any]:
    """The object in a file. Raises ValueError where it is none, or lacks one of `keys`, and as opening a file does."""
    return parse_record(path.read_bytes(), str(path), *keys)


def parse_record(text: bytes, name: str, *keys: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    if not isinstance(record, dict) or any(key not in record for key in keys):
        raise ValueError(f"{name} is damaged, or of another program")
    return record
