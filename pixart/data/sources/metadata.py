"""Metadata files of an image folder, as the `imagefolder` of Hugging Face datasets reads them.

`metadata.jsonl`, `.csv` or `.parquet` has a column `file_name`, relative to its own folder, and columns with captions
and a label.
"""

import csv
import io
import json
import posixpath
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pixart.config.dataset import ColumnsConfig
from pixart.data.sources.file_index import FileList
from pixart.data.sources.texts import caption_names, decode_text, label_names, label_of

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass(kw_only=True, slots=True)
class Metadata:
    """The rows of the metadata files by the name of their image."""

    files: list[str] = field(default_factory=list)
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)  # captions alone
    labels: dict[str, int] = field(default_factory=dict)
    class_names: list[str] = field(default_factory=list)  # if the labels are words
    left_out: Counter[str] = field(default_factory=Counter)


def read_metadata(files: FileList, images: Collection[str], columns: ColumnsConfig) -> Metadata:
    """Read the metadata files beside the images. Raises ValueError if one is damaged as a whole."""
    metadata = Metadata(files=[name for name in files.sizes if posixpath.basename(name) in NAMES])
    captions, known = caption_names(columns), set(images)
    words: dict[str, str] = {}  # labels that are no integers
    for name in metadata.files:
        data = files.system.cat_file(files.path(name))
        for values in _rows(f"source {files.url!r}: {name}", name, data, metadata.left_out):
            file_name = next((values[key] for key in values if key and key.endswith("file_name") and values[key]), None)
            image = posixpath.normpath(posixpath.join(posixpath.dirname(name), str(file_name)))
            if file_name is None or image not in known:
                metadata.left_out["row of metadata without its image"] += 1
                continue
            metadata.rows[image] = {key: values[key] for key in captions if values.get(key) not in (None, "")}
            label = next((values[key] for key in label_names(columns) if values.get(key) not in (None, "")), None)
            if label is None:
                continue
            index, problem = label_of(label)
            if not problem:
                metadata.labels[image] = index
            elif isinstance(label, str):
                words[image] = label
            else:
                metadata.left_out["label of metadata that is no integer or word"] += 1
    if words:
        words |= {image: str(label) for image, label in metadata.labels.items()}
        metadata.class_names = sorted(set(words.values()))
        indices = {name: label for label, name in enumerate(metadata.class_names)}
        metadata.labels = {image: indices[word] for image, word in words.items()}
    return metadata


def _rows(description: str, name: str, data: bytes, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a metadata file; a line that is no JSON object is left out."""
    if name.endswith(".csv"):
        try:
            yield from csv.DictReader(io.StringIO(decode_text(data)))
        except csv.Error as error:
            raise ValueError(f"{description} cannot be read: {error}; repair or remove it") from None
    elif name.endswith(".jsonl"):
        for line in decode_text(data).split("\n"):
            try:
                values = json.loads(line) if line.strip() else None
            except (ValueError, RecursionError):
                values = ()
            if isinstance(values, dict):
                yield values
            elif values is not None:
                left_out["damaged line of metadata"] += 1
    else:
        try:
            yield from pq.read_table(io.BytesIO(data)).to_pylist()
        except (pa.ArrowInvalid, UnicodeDecodeError) as error:
            raise ValueError(f"{description} cannot be read: {error}; repair or remove it") from None
