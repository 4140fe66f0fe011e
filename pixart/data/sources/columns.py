"""The columns of a parquet file that hold the image, the captions and the class."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from pixart.config.dataset import ColumnsConfig
from pixart.data.listing.file_list import FileList
from pixart.data.sources.texts import caption_names, label_names, pick
from pixart.terminal import printable

IMAGE_NAMES = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes", "content")
PATH_NAMES = ("image", "image_path", "img_path", "file_name", "filename", "filepath", "path")  # of columns of paths
CLASS_NAMES = ("class", "class_name", "category")  # of columns with the words of a class

URL_NAMES = ("url", "image_url", "img_url")
# What pyarrow raises for damaged content; UnicodeDecodeError is a ValueError.
DAMAGED = (pa.ArrowException, OSError, ValueError, OverflowError)

LabelKind = Literal["integer", "words", "wordnet"]  # `wordnet` is an id that begins with one, such as n01440764_18


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The columns that are read, or keys of the file's folder such as `label=3`; None for those that are missing."""

    image: str
    image_is_path: bool  # the column holds texts
    captions: tuple[str, ...]  # in the order in which they are tried
    label: str | None
    label_kind: LabelKind
    class_words: str | None  # words of the class, for a row without a caption

    @property
    def names(self) -> set[str]:
        return {name for name in (self.image, *self.captions, self.label, self.class_words) if name}

    def by_role(self) -> dict[str, list[str]]:
        """Return the columns by what is taken from them."""
        words = [self.class_words] if self.class_words else []
        return {
            "image": [self.image],
            "caption": [*self.captions, *words],
            "label": [self.label] if self.label else [],
        }


def find_layout(schema: pa.Schema, partition: Mapping[str, str], columns: ColumnsConfig) -> Layout:
    """Find the columns of a file by their names and types, or by those that the configuration names.

    Raises ValueError, without the name of the source, if there is no image or a named column is missing or unusable.
    """
    kinds = {name: pa.string() for name in partition} | {field.name: _plain(field.type) for field in schema}
    listed = f"its columns are {', '.join(map(printable, kinds))}"
    image = _find_image(kinds, columns)
    if image is None:
        wanted = f"`{columns.image}`" if columns.image else "`image`"
        has_urls = any(name.lower() in URL_NAMES for name in kinds)
        advice = "download the images of its URLs, as img2dataset does" if has_urls else "name it by data.columns.image"
        raise ValueError(
            f"{listed}; it must have a column {wanted}, binary or a struct with binary `bytes`, or paths; {advice}"
        )
    label = next((name for name, _ in pick(kinds, label_names(columns)) if is_label(name, kinds, partition)), None)
    label_kind: LabelKind = "integer"
    if columns.label and columns.label in kinds and not label:
        label, label_kind = columns.label, "words"
        if not _is_text(kinds[label]):
            raise ValueError(f"its column `{label}` has type {kinds[label]}; it must have integers or texts")
    if not label and "label" in kinds and not columns.label and not pa.types.is_null(kinds["label"]):
        raise ValueError(
            f"its column `label` has type {kinds['label']}; it must have an integer type; for a class of words, set "
            "data.columns.label"
        )
    words = next((name for name in CLASS_NAMES if name in kinds and _is_text(kinds[name]) and name != label), None)
    if not label and not columns.label and words == "class" and _is_text(kinds.get("id", pa.null())):
        label, label_kind = "id", "wordnet"
    captions = tuple(name for name, _ in pick(kinds, caption_names(columns)) if name != image)
    return Layout(
        image=image,
        image_is_path=_is_text(kinds[image]),
        captions=captions,
        label=label,
        label_kind=label_kind,
        class_words=words,
    )


def _find_image(kinds: dict[str, pa.DataType], columns: ColumnsConfig) -> str | None:
    if columns.image:
        kind = kinds.get(columns.image, pa.null())
        return columns.image if _is_image(kind) or _is_text(kind) else None
    stored = next((name for name, kind in pick(kinds, IMAGE_NAMES) if _is_image(kind)), None)
    return stored or next((name for name, kind in pick(kinds, PATH_NAMES) if _is_text(kind)), None)


def is_label(name: str, kinds: Mapping[str, pa.DataType], partition: Mapping[str, str]) -> bool:
    """Return whether a column, or the value of a partition, is an integer."""
    if name in partition:
        return partition[name].lstrip("-").isdecimal()
    kind = kinds[name]
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)


def _plain(kind: pa.DataType) -> pa.DataType:
    """Return the type of the values of a dictionary or of an extension type, and any other type unchanged."""
    while pa.types.is_dictionary(kind) or isinstance(kind, pa.BaseExtensionType):
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind.storage_type
    return kind


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def _is_image(kind: pa.DataType) -> bool:
    if not pa.types.is_struct(kind):
        return _is_binary(kind)
    fields = {field.name: _plain(field.type) for field in kind}
    return _is_binary(fields.get("bytes", pa.null())) or _is_text(fields.get("path", pa.null()))


def partition_of(name: str) -> dict[str, str]:
    """Return the columns that the folders of a file state, as Hive writes them: `label=3/part-0.parquet`."""
    parts = (part.partition("=") for part in name.split("/")[:-1] if "=" in part)
    return {key: unquote(value) for key, _, value in parts if value != "__HIVE_DEFAULT_PARTITION__"}


def class_names_of(schema: pa.Schema, label: str | None) -> list[str]:
    """Return the class names that Hugging Face datasets stores in a schema; an empty list without them."""
    try:
        info: Any = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        return [str(name) for name in info["info"]["features"][label]["names"]]
    except (ValueError, KeyError, TypeError):
        return []


def values_of(batch: pa.RecordBatch, begin: int = 0, end: int | None = None) -> list[dict[str, Any]]:
    """Return rows of a batch with their texts as bytes, since those of a damaged file may not be UTF-8."""
    selected = batch.slice(begin, None if end is None else end - begin)
    arrays = []
    for array in selected.columns:
        while array.type != (plain := _with_bytes(array.type)):
            array = array.storage if isinstance(array.type, pa.BaseExtensionType) else array.cast(plain)
        arrays.append(array)
    return pa.RecordBatch.from_arrays(arrays, names=batch.schema.names).to_pylist()


def _with_bytes(kind: pa.DataType) -> pa.DataType:
    """Return a type with binary in the place of texts, and values in the place of dictionaries."""
    kind = _plain(kind)
    if pa.types.is_string(kind):
        return pa.binary()
    if pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_string_view(kind):
        return pa.binary_view()
    if pa.types.is_list(kind):
        return pa.list_(_with_bytes(kind.value_type))
    if pa.types.is_large_list(kind):
        return pa.large_list(_with_bytes(kind.value_type))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_with_bytes(kind.value_type), kind.list_size)
    if pa.types.is_map(kind):
        return pa.map_(_with_bytes(kind.key_type), _with_bytes(kind.item_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _with_bytes(field.type)) for field in kind])
    return kind


def of_file_system(error: Exception) -> bool:
    """Return whether an exception is of the file system, and not of the content of a parquet file."""
    return isinstance(error, OSError) and error.errno is not None


def undamaged_batches(file: pq.ParquetFile, rows: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield the batches of the row groups that can be read; the rows of others are invalid when they are read."""
    for group in range(file.metadata.num_row_groups):
        try:
            yield from file.iter_batches(rows, row_groups=[group], columns=columns)
        except DAMAGED as error:
            if of_file_system(error):
                raise


@contextmanager
def open_parquet(files: FileList, name: str) -> Iterator[pq.ParquetFile]:
    """Open a file of a source. Raises ValueError if it is not a parquet file."""
    with files.system.open(files.path(name), "rb") as raw:
        try:
            file = pq.ParquetFile(raw)
        except DAMAGED as error:
            if of_file_system(error):
                raise
            line = printable(" ".join(str(error).split()))
            raise ValueError(f"source {files.url!r}: {name} is not a parquet file, or is damaged: {line}") from None
        with file:
            groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
            if min(groups, default=0) < 0 or sum(groups) != file.metadata.num_rows:
                raise ValueError(f"source {files.url!r}: {name} is damaged: its row groups have {sum(groups)} rows")
            yield file


def image_storage(files: FileList, columns: ColumnsConfig) -> Literal["bytes", "path"] | None:
    """Return whether the first file holds images or their paths; None if it holds neither."""
    name = next(iter(files.sizes))
    with open_parquet(files, name) as file:
        try:
            layout = find_layout(file.schema_arrow, partition_of(name), columns)
        except ValueError:
            return None
        return "path" if layout.image_is_path or has_paths_only(file, layout.image) else "bytes"


def has_paths_only(file: pq.ParquetFile, image: str) -> bool:
    """Return whether the image column has no bytes, by the file's statistics, so that no image is read."""
    schema = file.metadata.schema
    leaves = [schema.column(leaf).path for leaf in range(len(schema))]
    if f"{image}.bytes" not in leaves:
        return f"{image}.path" in leaves or pa.types.is_string(file.schema_arrow.field(image).type)
    leaf = leaves.index(f"{image}.bytes")
    if pa.types.is_null(file.schema_arrow.field(image).type.field("bytes").type):
        return True
    groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
    statistics = [group.column(leaf).statistics for group in groups]
    return bool(groups) and all(
        group_statistics is not None and group_statistics.null_count == group.num_rows
        for group, group_statistics in zip(groups, statistics, strict=True)
    )
