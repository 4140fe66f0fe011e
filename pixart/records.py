"""The one reader of JSON and TOML records, by a schema, and the checksum of records' own content. Imports no torch.

A schema is a dataclass, a TypedDict or any annotation that msgspec converts to. A record of another form, whatever it
holds, is a ValueError of one line that names the file.
"""

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import msgspec

CHECKSUM = "sha256"
MAX_BYTES = 1 << 28  # of one record; the largest ones list the files of a source
MAX_DEPTH = 64  # of lists and objects in each other; far below what Python's stack can hold

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]  # a number of things, or a size in bytes
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**53)]
Moment = Annotated[float, msgspec.Meta(ge=0, le=2e11)]  # seconds since 1970
Nodes = Annotated[int, msgspec.Meta(ge=0, le=10_000)]
Prompts = Annotated[int, msgspec.Meta(ge=1, le=10**8)]
Parts = Annotated[int, msgspec.Meta(ge=0, le=10**6)]  # array elements
Ranks = Annotated[int, msgspec.Meta(ge=1, le=128)]  # on one node


class TensorRecord(TypedDict):
    """The place of a tensor in a safetensors file; the metadata of the file, which is an object of texts, has none."""

    dtype: NotRequired[str]
    shape: NotRequired[list[Count]]
    data_offsets: NotRequired[tuple[Count, Count]]


Header = dict[str, TensorRecord]  # of a safetensors file
Checksums = dict[str, tuple[Count, Count]]  # length and CRC-32C of files by their paths


def read(path: Path, schema: Any) -> Any:
    """Return the JSON record in a file. Raises ValueError as `parse` does, and OSError if it cannot be read."""
    return parse(read_limited(path), schema, str(path))


def read_lines(path: Path, schema: Any) -> list[Any]:
    """Return the JSON records of a file with one per line; errors name the line."""
    lines = decode(read_limited(path), str(path)).split("\n")
    return [parse(line, schema, f"{path}: line {number}") for number, line in enumerate(lines, 1) if line.strip()]


def read_limited(path: Path) -> bytes:
    """Return the content of a file. Raises ValueError for one that is no regular file or larger than MAX_BYTES."""
    if path.exists() and not path.is_file() and not path.is_dir():  # a named pipe would never end
        raise ValueError(f"{path}: is not a file; restore it")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path}: is larger than {MAX_BYTES >> 20} MiB; restore it")
    return content


def parse(text: bytes | str, schema: Any, name: str) -> Any:
    """Return the record in a JSON text.

    Raises ValueError, naming `name`, for a text that is not JSON or that does not fit the schema.
    """
    return convert(parse_with(json.loads, text, name, "JSON"), schema, name)


def parse_toml(text: bytes | str, name: str) -> dict[str, Any]:
    """Return the content of a TOML text. Raises ValueError, naming `name`, for other texts."""
    return parse_with(tomllib.loads, text, name, "TOML")


def parse_with(parser: Callable[[str], Any], text: bytes | str, name: str, form: str) -> Any:
    """Return the values that a parser finds in a text. Raises ValueError, naming `name`, if it cannot read the text."""
    decoded = decode(text, name, form)
    try:
        value = parser(decoded)
        if "\\ud" in decoded.lower():  # half a character, which no output could encode
            json.dumps(value, ensure_ascii=False, default=str).encode()
    except RecursionError:
        raise ValueError(f"{name}: is not {form}; it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError(f"{name}: is not {form}; it has half a character of UTF-16") from None
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{name}: is not {form}; {reason}") from None
    if depth_exceeds(value, MAX_DEPTH):
        raise ValueError(f"{name}: is nested more than {MAX_DEPTH} levels deep; restore it")
    return value


def depth_exceeds(value: Any, limit: int) -> bool:
    """Return whether lists and objects are nested more than `limit` levels deep; without recursion."""
    level = [value]
    for _ in range(limit):
        parts = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [inner for part in parts for inner in part if isinstance(inner, dict | list)]
        if not level:
            return False
    return True


def decode(text: bytes | str, name: str, form: str = "JSON") -> str:
    """Return a text in UTF-8. Raises ValueError, naming `name`, for one of another encoding."""
    try:
        return text if isinstance(text, str) else text.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{name}: is not {form}; it is no text in utf-8") from None


def convert(value: Any, schema: Any, name: str) -> Any:
    """Return the values of JSON or TOML as an object of the schema; for a TypedDict, the values themselves.

    Keys that a TypedDict does not have are kept; those that a dataclass does not have are refused, at any depth.
    """
    try:
        record = msgspec.convert(value, schema)
    except (msgspec.ValidationError, RecursionError, OverflowError) as error:
        problem = " ".join(str(error).split())[:300].replace("`", "'").replace(" - at '$.", " at '")
        raise ValueError(f"{name}: is damaged or of another version, {problem}; restore it") from None
    if key := next(unknown_keys(value, record), None):
        raise ValueError(f"{name}: is damaged or of another version, it has the key {key!r}; restore it")
    return value if isinstance(record, dict) else record


def unknown_keys(value: Any, record: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of values that the dataclasses which were made from them do not have."""
    if dataclasses.is_dataclass(record) and isinstance(value, Mapping):
        names = {field.name for field in dataclasses.fields(record)}
        for key, inner in value.items():
            if key not in names:
                yield f"{prefix}{key}"
            else:
                yield from unknown_keys(inner, getattr(record, key), f"{prefix}{key}.")
    elif isinstance(record, list | tuple) and record and dataclasses.is_dataclass(record[0]):
        for inner, one in zip(value, record, strict=True):
            yield from unknown_keys(inner, one, prefix)


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
