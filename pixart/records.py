"""JSON records that contain a checksum of their own content, so that no altered value is used. Imports no torch."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

CHECKSUM = "sha256"


def dumps(record: Mapping[str, Any]) -> bytes:
    """Return the JSON text of a record with its checksum."""
    return (json.dumps({**record, CHECKSUM: digest(record)}, indent=2) + "\n").encode()


def check(record: Mapping[str, Any], name: str) -> None:
    """Raise ValueError if a record, which `name` names, has another content than its checksum says."""
    if record.get(CHECKSUM) != digest(record):
        raise ValueError(f"{name}: was edited or is damaged, its SHA-256 does not match; restore the file")


def digest(record: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a record without its checksum, in hexadecimal digits."""
    content = {key: value for key, value in record.items() if key != CHECKSUM}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
