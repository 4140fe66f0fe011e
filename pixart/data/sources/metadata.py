"""Metadata files of an image folder, as the `imagefolder` of Hugging Face datasets reads them.

`metadata.jsonl`, `.csv` or `.parquet` has a column `file_name`, relative to its own folder, and columns with captions
and a label. They are read row by row, since they can be as long as the folder.
"""

import csv
import io
import json
import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pixart.config.dataset import ColumnsConfig
from pixart.data.listing.file_list import FileList
from pixart.data.listing.folder_table import FolderTable
from pixart.data.sources.columns import values_of
from pixart.data.sources.texts import as_text, caption_names, encoding_of, label_names, label_of, pick

NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
# Columns of the image's name, in the order in which they are tried; `*_file_name` comes after the first two.
FILE_NAMES = ("file_name", "image_file_name")
OTHER_FILE_NAMES = ("filename", "file_path", "filepath", "image_path", "img_path", "image", "file", "path", "name")
DELIMITERS = (",", ";", "\t", "|")
MAX_LINE = 1 << 24  # characters of a line of metadata
MAX_CLASSES = 1_000_000  # labels that are words; more are captions or names of files


class Labels:
    """The labels of metadata: integers, or words, which are numbered in alphabetical order."""

    def __init__(self) -> None:
        self.words: set[str] = set()
        self.numbers: set[int] = set()
        self._indices: dict[str, int] | None = None

    def add(self, label: Any, description: str) -> int | str | None:
        """Return a label as an integer or a word, None if it is neither.

        Raises ValueError if there are too many different words.
        """
        index, problem = label_of(label)
        if not problem:
            self.numbers.add(index)
            return index
        if not isinstance(label, str):
            return None
        self.words.add(label)
        if len(self.words) > MAX_CLASSES:
            raise ValueError(
                f"{description}: its labels are more than {MAX_CLASSES} words; name their column by data.columns.label"
            )
        return label

    @property
    def class_names(self) -> list[str]:
        """The words in the order of their labels; an empty list if the labels are integers."""
        return sorted(self.words | {str(number) for number in self.numbers if number >= 0}) if self.words else []

    def index(self, label: int | str | None) -> int:
        """Return the index of a label that `add` has returned; -1 for None."""
        if label is None or label == -1:
            return -1
        if not self.words:
            assert isinstance(label, int)
            return label
        if self._indices is None:
            self._indices = {name: index for index, name in enumerate(self.class_names)}
        return self._indices[str(label)]


def add_metadata(
    files: FileList, names: Sequence[str], table: FolderTable, columns: ColumnsConfig
) -> tuple[Labels, Counter[str]]:
    """Add the rows of the metadata files `names` to the table, as JSON [label, captions by column].

    Returns the labels, and the number of lines and labels that are left out by reason. Raises ValueError if a file is
    damaged as a whole, or has no column with the names of images.
    """
    labels, left_out = Labels(), Counter[str]()
    captions = caption_names(columns)
    if len(suffixes := {posixpath.splitext(name)[1] for name in names}) > 1:
        raise ValueError(
            f"source {files.url!r}: has metadata files of different kinds ({', '.join(sorted(suffixes))}); remove all "
            "but one kind"
        )
    for name in names:
        description, is_named = f"source {files.url!r}: {name}", False
        for values in _rows(files, name, description, left_out):
            key = file_name_column(values, columns)
            is_named = is_named or key is not None
            file_name = as_text(values[key]) if key is not None else ""
            if not file_name:
                left_out["row of metadata without its image"] += 1
                continue
            words = {caption: value for caption, value in pick(values, captions) if value not in (None, "")}
            label = next((value for _, value in pick(values, label_names(columns)) if value not in (None, "")), None)
            known = (
                None
                if label is None
                else labels.add(as_text(label) if isinstance(label, bytes) else label, description)
            )
            if label is not None and known is None:
                left_out["label of metadata that is no integer or word"] += 1
            image = _image_name(files, table, posixpath.dirname(name), file_name)
            table.add_description(image, json.dumps([known, words], default=as_text))
        if not is_named:
            raise ValueError(f"{description} has no row with a `file_name`; it must name the image of each row")
    return labels, left_out


def file_name_column(values: Mapping[str, Any], columns: ColumnsConfig) -> str | None:
    """Return the key of the image's name in a row; None without one."""
    if columns.image:
        return columns.image if columns.image in values else None
    keys = [key for key in values if isinstance(key, str) and values[key]]
    exact = next((key for name in FILE_NAMES for key in keys if key == name), None)
    ending = next((key for key in keys if key.endswith("_file_name")), None)
    return exact or ending or next((key for name in OTHER_FILE_NAMES for key in keys if key.lower() == name), None)


def _image_name(files: FileList, table: FolderTable, folder: str, file_name: str) -> str:
    """Return the name of an image within the source; it may be written with the separators of Windows."""
    file_name = file_name.removeprefix(f"{files.root}/")
    image = posixpath.normpath(posixpath.join(folder, file_name))
    if "\\" in file_name and not table.has_image(image):
        return posixpath.normpath(posixpath.join(folder, file_name.replace("\\", "/")))
    return image


def _rows(files: FileList, name: str, description: str, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a metadata file; a line that is no JSON object is left out."""
    with files.system.open(files.path(name), "rb") as raw:
        if name.endswith(".parquet"):
            try:
                with pq.ParquetFile(raw) as file:
                    for batch in file.iter_batches():
                        yield from values_of(batch)
            except (pa.ArrowException, OSError) as error:
                line = " ".join(str(error).split())
                raise ValueError(f"{description} cannot be read: {line}; repair or remove it") from None
            return
        head = raw.read(1 << 12)
        raw.seek(0)
        with io.TextIOWrapper(raw, encoding_of(head), "replace", newline="") as text:
            yield from (_csv_rows(text, description) if name.endswith(".csv") else _json_rows(text, left_out))


def _csv_rows(text: io.TextIOWrapper, description: str) -> Iterator[dict[str, Any]]:
    first = text.readline(MAX_LINE)
    counts = {delimiter: first.count(delimiter) for delimiter in DELIMITERS}
    delimiter = max(DELIMITERS, key=lambda letter: counts[letter])  # the first of those that are as frequent
    text.seek(0)
    reader = csv.reader(text, delimiter=delimiter)
    try:
        header = [name.strip() for name in next(reader, [])]
        for row in reader:
            if row:
                yield dict(zip(header, row, strict=False))
    except csv.Error as error:
        raise ValueError(f"{description} cannot be read: {error}; repair or remove it") from None


def _json_rows(text: io.TextIOWrapper, left_out: Counter[str]) -> Iterator[dict[str, Any]]:
    while line := text.readline(MAX_LINE):
        is_complete = line.endswith("\n") or len(line) < MAX_LINE
        while not is_complete:
            is_complete = (rest := text.readline(MAX_LINE)).endswith("\n") or not rest
            line = "?"
        try:
            values = json.loads(line) if line.strip("\ufeff \t\r\n") else None
        except (ValueError, RecursionError):
            values = ()
        if isinstance(values, dict):
            yield values
        elif values is not None:
            left_out["damaged line of metadata"] += 1
