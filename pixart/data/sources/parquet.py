"""An image source of parquet files in the layout of Hugging Face datasets.

The column `image` is a struct with binary `bytes`, or binary itself. The columns `label`, class indices, and `text` or
`caption` are optional.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pixart.data.sources.base import Item, class_phrase
from pixart.data.sources.file_index import FileList, RowIndex

BATCH_ROWS = 32  # rows read at a time


class ParquetSource:
    """Rows of parquet files, of which only the required row groups are read.

    The text of a row without a caption is the name of its class.
    """

    def __init__(self, files: FileList, max_images: int | None, counts_file: Path | None):
        self._files = files
        self._rows = RowIndex(files, max_images, counts_file, self._count_rows)
        with self._open(next(iter(files.sizes))) as file:
            schema = file.schema_arrow
        self._columns = [name for name in ("image", "label", "text", "caption") if name in schema.names]
        self._check_schema(schema)
        self.class_names = _class_names(schema)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, stop: int) -> Iterator[Item]:
        for name, first, end in self._rows.spans(start, stop):
            with self._open(name) as file:
                self._check_schema(file.schema_arrow)
                groups, row = _row_groups(file.metadata, first, end)
                for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=self._columns):
                    skip = min(max(first - row, 0), len(batch))
                    selected = batch.slice(skip, max(end - row - skip, 0)).to_pylist()
                    for number, values in enumerate(selected, row + skip):
                        yield self._item(f"{name}:{number}", values)
                    row += len(batch)
                    if row >= end:
                        break

    def _item(self, id: str, values: dict) -> Item:
        image = values["image"]
        data = (image["bytes"] if isinstance(image, dict) else image) or b""
        label = -1 if values.get("label") is None else values["label"]
        text = values.get("text", values.get("caption"))
        if text is None and 0 <= label < len(self.class_names):
            text = class_phrase(self.class_names[label])
            return Item(id=id, data=data, label=label, text=text, text_is_class=True)
        return Item(id=id, data=data, label=label, text=text or "")

    def _count_rows(self, name: str) -> int:
        with self._open(name) as file:
            return file.metadata.num_rows

    @contextmanager
    def _open(self, name: str) -> Iterator[pq.ParquetFile]:
        with self._files.system.open(self._files.path(name), "rb") as raw:
            try:
                file = pq.ParquetFile(raw)
            except pa.ArrowInvalid:
                raise ValueError(f"source {self._files.url!r}: {name} is not a parquet file") from None
            with file:
                yield file

    def _check_schema(self, schema: pa.Schema) -> None:
        url, kinds = self._files.url, {field.name: field.type for field in schema}
        image, label = kinds.get("image", pa.null()), kinds.get("label", pa.int64())
        if pa.types.is_struct(image):
            image = next((field.type for field in image if field.name == "bytes"), pa.null())
        if not (pa.types.is_binary(image) or pa.types.is_large_binary(image)):
            raise ValueError(
                f"source {url!r}: its columns are {', '.join(schema.names)}; "
                "it must have a column `image`, binary or a struct with binary `bytes`"
            )
        if not pa.types.is_integer(label):
            raise ValueError(f"source {url!r}: its column `label` has type {label}; it must have an integer type")


def _row_groups(metadata: pq.FileMetaData, first: int, end: int) -> tuple[list[int], int]:
    """Return the row groups that contain rows first to end - 1, and the first row of these row groups."""
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    begins = list(accumulate(sizes, initial=0))
    groups = [group for group, (begin, stop) in enumerate(pairwise(begins)) if max(first, begin) < min(end, stop)]
    return groups, begins[groups[0]]


def _class_names(schema: pa.Schema) -> list[str]:
    info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return list(info.get("info", {}).get("features", {}).get("label", {}).get("names", []))
