"""The items of an image folder in their order, as the listing that `init` stores with a dataset.

Items are the images in the order of their names or, where there are metadata files, those of their rows in the rows'
order, as Hugging Face datasets reads them.
"""

import json
import re
from collections import Counter
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from pixart.config.dataset import ColumnsConfig
from pixart.data.listing.blocks import Writer
from pixart.data.listing.file_list import SPLITS, FileList
from pixart.data.listing.folder_table import FolderTable, Sidecar
from pixart.data.sources.base import printable_name
from pixart.data.sources.contents import Contents
from pixart.data.sources.metadata import add_metadata

UNEVEN = "folders as classes, because they are at different depths"
SHARD_FOLDER = re.compile(r"\d{5,}")  # as img2dataset names its folders


class ImageRow(NamedTuple):
    """An item of a folder."""

    name: str
    size: int  # bytes, -1 if the file system does not report it
    sidecars: list[Sidecar]
    label: int
    captions: dict[str, Any]  # of its row of metadata, by column


class Folders:
    """Folders of images, and which of them are classes."""

    def __init__(self) -> None:
        self._images: set[str] = set()
        self._without_class: set[str] = set()  # folders of shards that another tool has written

    def add_image(self, name: str) -> None:
        self._images.add(_parent(name))

    def add_other(self, name: str) -> None:
        """Note a file that shows that a folder is a shard: `00000.parquet`, `00000_stats.json`, `00000/000000.json`."""
        parent = _parent(name)
        if name.endswith(".json") and SHARD_FOLDER.fullmatch(PurePosixPath(parent).name):
            self._without_class.add(parent)
        for end in (".parquet", "_stats.json"):
            if name.endswith(end):
                self._without_class.add(name.removesuffix(end))

    def classes(self) -> tuple[dict[str, str], bool]:
        """Return the class of each folder that is one, and whether the folders are at the same depth.

        At least two classes have to differ, and folders at different depths are no classes, as in datasets.
        """
        folders = {folder: PurePosixPath(folder) for folder in self._images - self._without_class - {""}}
        outer = {path.parts[0] for path in folders.values() if len(path.parts) > 1}
        are_splits = all(path.name.lower() in SPLITS for path in folders.values() if len(path.parts) == 1)
        classes = {
            folder: path.name
            for folder, path in folders.items()
            if not (_is_split(path) and (are_splits or path.name in outer))
        }
        names = set(classes.values())
        if len(names) < 2 or {name.lower() for name in names} <= set(SPLITS):
            return {}, True
        depths = {len(folders[folder].parts) - (folders[folder].parts[0].lower() in SPLITS) for folder in classes}
        return classes, len(depths) == 1


def write_index(
    files: FileList,
    table: FolderTable,
    folders: Folders,
    metadata: list[str],
    writer: Writer,
    *,
    columns: ColumnsConfig,
    max_images: int | None,
) -> tuple[list[str], Contents]:
    """Write an ImageRow for each item, and return the names of the classes, and what the folder holds and leaves out.

    `metadata` names the metadata files. Whether there are words is not looked at. Raises ValueError if a metadata file
    is damaged as a whole.
    """
    left_out = Counter(files.left_out)
    if metadata:
        labels, damaged = add_metadata(files, metadata, table, columns)
        table.index_descriptions()
        class_names, left_out = labels.class_names, left_out + damaged
        rows = (
            ImageRow(name, size, sidecars, labels.index(label), captions)
            for name, size, sidecars, content in table.described_images()
            for label, captions in [json.loads(content)]
        )
    else:
        table.index_descriptions()
        classes, are_even = folders.classes()
        if not are_even:
            left_out[UNEVEN] = len(classes)
            classes = {}
        class_names = sorted(set(classes.values()))
        indices = {name: label for label, name in enumerate(class_names)}
        rows = (
            ImageRow(name, size, sidecars, indices.get(classes.get(_parent(name), ""), -1), {})
            for name, size, sidecars in table.images()
        )
    counts = Contents(left_out=left_out + table.left_out())
    for row in islice(rows, max_images):
        writer.add(row)
        counts.items += 1
        counts.labelled += row.label >= 0
        counts.largest_label = max(counts.largest_label, row.label)
    return [printable_name(name) for name in class_names], counts


def _is_split(folder: PurePosixPath) -> bool:
    return len(folder.parts) == 1 and folder.name.lower() in SPLITS


def _parent(name: str) -> str:
    return name.rpartition("/")[0]
