"""An image source of parquet files in the layout of Hugging Face datasets; `columns` says which columns are read.

An image is binary, or a struct of `bytes` and `path`; where there are no bytes, the path is read, relative to the
parquet file, to its parent folder or to the source. Columns may differ between files.
"""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from posixpath import dirname
from typing import Any, TypedDict

import pyarrow.compute as pc
import pyarrow.parquet as pq

from pixart import records
from pixart.atomic import write_atomically
from pixart.config.dataset import ColumnsConfig
from pixart.data.listing.file_list import FileList
from pixart.data.sources.base import Item, class_phrase, printable_name
from pixart.data.sources.columns import (
    DAMAGED,
    Layout,
    class_names_of,
    find_layout,
    has_paths_only,
    of_file_system,
    open_parquet,
    partition_of,
    undamaged_batches,
    values_of,
)
from pixart.data.sources.contents import Contents, merged
from pixart.data.sources.row_index import RowIndex
from pixart.data.sources.texts import caption_of, decode_text, first_caption, label_of
from pixart.terminal import printable

BATCH_ROWS = 32  # rows read at a time
CLASSES_FILE = "source-classes.json"  # beside the row counts: classes that are words, in the order of their labels
WORDNET_ID = re.compile(r"(n\d+)(_\d+)?")


class ClassesRecord(TypedDict):
    """The ids of the classes of a source, and their words, in the order of the labels."""

    ids: list[str]
    names: list[str]


class ParquetSource:
    """Rows of parquet files, of which only the required row groups are read.

    The text of a row is the first of its captions that is not empty, one of a list chosen by `seed`, or else the name
    of its class.
    """

    def __init__(
        self,
        files: FileList,
        max_images: int | None,
        counts_file: Path | None,
        seed: int = 0,
        columns: ColumnsConfig | None = None,
    ):
        self._files, self._seed, self._config = files, seed, columns or ColumnsConfig()
        self._rows = RowIndex(files, max_images, counts_file, self._count_rows)
        first = next(iter(files.sizes))
        with self._open(first) as file:
            layout = self._layout(first, file)
            self.class_names = class_names_of(file.schema_arrow, layout.label)
            if has_paths_only(file, layout.image):
                self._check_paths(first, file, layout)
        if not layout.label:
            layout = self._find_labels(layout)
        self._classes: dict[str, int] = {}  # labels of classes that are words or ids
        if layout.label_kind != "integer":
            ids, self.class_names = self._read_classes(counts_file)
            self._classes = {name: label for label, name in enumerate(ids)}

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, stop: int) -> Iterator[Item]:
        place = start
        for name, first, end in self._rows.spans(start, stop):
            with self._open(name) as file:
                if file.metadata.num_rows != self._rows.count(name):
                    raise ValueError(
                        f"source {self._files.url!r}: {name} has {file.metadata.num_rows} rows, but had "
                        f"{self._rows.count(name)} when they were counted; restore the file or create another dataset"
                    )
                layout, partition = self._layout(name, file), partition_of(name)
                for group, begin, stop_row in _row_groups(file.metadata, first, end):
                    for number, values in self._group_values(file, group, begin, stop_row, layout):
                        if isinstance(values, str):
                            yield Item(
                                id=printable_name(f"{name}:{number}"), data=b"", label=-1, text="", image_problem=values
                            )
                        else:
                            yield self._item(name, number, {**partition, **values}, layout, place)
                        place += 1

    def _group_values(
        self, file: pq.ParquetFile, group: int, begin: int, end: int, layout: Layout
    ) -> Iterator[tuple[int, dict[str, Any] | str]]:
        """Yield the values of rows begin to end - 1 of the file, all in one row group, or why they cannot be read."""
        first = sum(file.metadata.row_group(other).num_rows for other in range(group))
        columns, row, done = sorted(layout.names & set(file.schema_arrow.names)), first, begin
        try:
            for batch in file.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns):
                skip = min(max(begin - row, 0), len(batch))
                for number, values in enumerate(values_of(batch, skip, max(end - row, skip)), row + skip):
                    yield number, values
                    done = number + 1
                row += len(batch)
                if row >= end:
                    break
            yield from ((number, f"its row group {group} is damaged: it ends early") for number in range(done, end))
        except DAMAGED as error:
            if of_file_system(error):
                raise
            line = printable(" ".join(str(error).split()))
            yield from ((number, f"its row group {group} is damaged: {line}") for number in range(done, end))

    def contents(self) -> Contents:
        """Count rows and labels and note the columns taken. Reads labels, and captions up to the first words."""
        counts = merged(self._contents_of(name) for name in self._files.sizes)
        counts.left_out += self._files.left_out
        return counts

    def _contents_of(self, name: str) -> Contents:
        with self._open(name) as file:
            layout, partition = self._layout(name, file), partition_of(name)
            counts = Contents(items=file.metadata.num_rows, columns=layout.by_role())
            if layout.label in partition:
                label = self._label(partition[layout.label], layout)[0]
                counts.largest_label, counts.labelled = label, counts.items if label >= 0 else 0
            elif layout.label:
                for batch in undamaged_batches(file, 1 << 16, [layout.label]):
                    for value in pc.value_counts(batch.column(0)).to_pylist():
                        label = self._label(value["values"], layout)[0]
                        counts.labelled += value["counts"] if label >= 0 else 0
                        counts.largest_label = max(counts.largest_label, label)
            counts.has_words = bool(counts.labelled and self.class_names)
            texts = [*layout.captions, *([layout.class_words] if layout.class_words else [])]
            if columns := [column for column in texts if column in file.schema_arrow.names]:
                for batch in undamaged_batches(file, 256, columns):
                    if counts.has_words:
                        break
                    rows = ([(column, values[column]) for column in columns] for values in values_of(batch))
                    counts.has_words = any(first_caption(row, self._seed, 0)[0] for row in rows)
        return counts

    def _item(self, name: str, number: int, values: dict[str, Any], layout: Layout, row: int) -> Item:
        data, image_problem = self._image(name, values[layout.image], layout)
        label, label_problem = self._label(values.get(layout.label) if layout.label else None, layout)
        text, problem = first_caption(((caption, values.get(caption)) for caption in layout.captions), self._seed, row)
        text_is_class = False
        if not text and not problem:
            words = caption_of(values.get(layout.class_words), 0, 0)[0] if layout.class_words else ""
            if not words and 0 <= label < len(self.class_names):
                words = self.class_names[label]
            text, text_is_class = class_phrase(words), bool(words)
        return Item(
            id=printable_name(f"{name}:{number}"),
            data=data,
            label=label,
            text=text,
            text_is_class=text_is_class,
            image_problem=image_problem,
            label_problem=label_problem,
            text_problem=problem,
        )

    def _label(self, value: Any, layout: Layout) -> tuple[int, str]:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return -1, ""
        if layout.label_kind == "integer":
            return label_of(value)
        return self._classes.get(_class_id(value, layout), -1), ""

    def _image(self, name: str, value: Any, layout: Layout) -> tuple[bytes, str]:
        """Return an image as stored and "", or b"" and why it cannot be read."""
        if isinstance(value, dict):
            stored, path = value.get("bytes"), value.get("path")
        else:
            stored, path = (None, value) if layout.image_is_path else (value, None)
        if stored or not path:
            return stored or b"", ""
        place = self._find_path(name, decode_text(path))
        return (self._files.system.cat_file(place), "") if place else (b"", f"its image {decode_text(path)} is missing")

    def _find_path(self, name: str, path: str) -> str | None:
        """Return the file that a path of a row means, None if it does not exist."""
        folder = dirname(self._files.path(name))
        bases = (folder, dirname(folder), self._files.root)
        places = [path] if path.startswith("/") else [f"{base}/{path}" for base in bases]
        return next((place for place in places if self._files.system.isfile(place)), None)

    def _check_paths(self, name: str, file: pq.ParquetFile, layout: Layout) -> None:
        """Raise ValueError if none of the first images of a file exists."""
        batch = next(undamaged_batches(file, BATCH_ROWS, [layout.image]), None)
        problems = [self._image(name, values[layout.image], layout)[1] for values in values_of(batch)] if batch else []
        if problems and all(problems):
            raise ValueError(
                f"source {self._files.url!r}: {name} holds paths and no images, and {problems[0].removeprefix('its ')} "
                "relative to the file, its parent folder and the source; restore the images, or store them in the file"
            )

    def _find_labels(self, layout: Layout) -> Layout:
        """Return the columns of the first file that has labels, and take the class names of that file."""
        for name in self._files.sizes:
            with self._open(name) as file:
                other = self._layout(name, file)
                if other.label:
                    self.class_names = class_names_of(file.schema_arrow, other.label)
                    return other
        return layout

    def _read_classes(self, counts_file: Path | None) -> tuple[list[str], list[str]]:
        """Return the ids of the classes in the order of their labels, and their words.

        Reads the class of every row, unless the file of an earlier process says them.
        """
        known = counts_file.with_name(CLASSES_FILE) if counts_file else None
        if known and known.exists():
            record = records.read(known, ClassesRecord)
            return record["ids"], record["names"]
        names: dict[str, str] = {}
        for name in self._files.sizes:
            with self._open(name) as file:
                layout, partition = self._layout(name, file), partition_of(name)
                both = (layout.label, layout.class_words)
                columns = [column for column in both if column and column in file.schema_arrow.names]
                if layout.label in partition:
                    names.setdefault(partition[layout.label], partition[layout.label])
                elif layout.label:
                    for batch in undamaged_batches(file, 1 << 14, columns):
                        for values in values_of(batch):
                            id = _class_id(values[columns[0]], layout)
                            words = next((caption_of(values[name], 0, 0)[0] for name in columns[1:]), "")
                            if id and not names.get(id):
                                names[id] = words if layout.label_kind == "wordnet" else id
        ids = sorted(names)
        record = {"ids": ids, "names": [names[id] or id for id in ids]}
        if known:
            write_atomically(known, json.dumps(record))
        return record["ids"], record["names"]

    def _count_rows(self, name: str) -> int:
        with self._open(name) as file:
            return file.metadata.num_rows

    def _layout(self, name: str, file: pq.ParquetFile) -> Layout:
        try:
            return find_layout(file.schema_arrow, partition_of(name), self._config)
        except ValueError as error:
            raise ValueError(f"source {self._files.url!r}: {error}") from None

    @contextmanager
    def _open(self, name: str) -> Iterator[pq.ParquetFile]:
        with open_parquet(self._files, name) as file:
            yield file


def _class_id(value: Any, layout: Layout) -> str:
    """Return the id of a class: the value itself, or the WordNet id that it begins with, "" if it has none."""
    text = decode_text(value) if isinstance(value, bytes) else str(value or "")
    if layout.label_kind != "wordnet":
        return text
    match = WORDNET_ID.fullmatch(text)
    return match[1] if match else ""


def _row_groups(metadata: pq.FileMetaData, first: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the row groups that contain rows first to end - 1, each with the range of its rows to read."""
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    for group, (begin, stop) in enumerate(pairwise(accumulate(sizes, initial=0))):
        if max(first, begin) < min(end, stop):
            yield group, max(first, begin), min(end, stop)
