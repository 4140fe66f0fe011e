"""Reading of the small JSON records of runs, checkpoints and datasets, with errors that name the damaged file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def of_this_version(path: Path | str) -> Iterator[None]:
    """Wrap the construction of an object from a record's fields.

    Raises ValueError, naming `path`, if the fields are those of another version.
    """
    try:
        yield
    except (TypeError, LookupError) as error:
        raise ValueError(f"{path} is of another version; {error}") from None


def read_record(path: Path, *keys: str) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises ValueError if the file holds no object or the object lacks one of `keys`, and OSError if it cannot be read.
    """
    return parse_record(path.read_bytes(), str(path), *keys)


def parse_record(text: bytes, name: str, *keys: str) -> dict[str, Any]:
    """Return the JSON object in a text. Raises ValueError, naming `name`, for other text or a missing key."""
    try:
        record = json.loads(text)
    except ValueError:
        record = None
    if not isinstance(record, dict) or any(key not in record for key in keys):
        raise ValueError(f"{name} is damaged, or was written by another program; restore it")
    return record
