"""An image source of tar files in the layout of WebDataset; `tar_index` says what their members mean.

The text of an item is its text member, or else a caption in its .json. Its label is its .cls member or a label in its
.json. Without one, the name of a tar is the class, where every tar is named after one.
"""

import re
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from pixart.config.dataset import ColumnsConfig
from pixart.data.sources.base import Item, class_phrase, printable_name
from pixart.data.sources.contents import Contents, merged
from pixart.data.sources.file_index import SPLITS, FileList, RowIndex
from pixart.data.sources.tar_index import Member, TarIndex, scan_tar
from pixart.data.sources.texts import caption_names, decode_text, first_caption, label_names, label_of, parse_json

WORDNET_ID = re.compile(r"n\d{8}")  # of a noun


class WebDatasetSource:
    """Items of tar files. The headers of a tar are read once; then only the required members are read.

    One caption of a list is chosen by `seed`.
    """

    def __init__(
        self,
        files: FileList,
        max_images: int | None,
        counts_file: Path | None,
        seed: int = 0,
        columns: ColumnsConfig | None = None,
    ):
        self._files, self._seed = files, seed
        self._columns = columns or ColumnsConfig()
        classes = _classes_by_tar(list(files.sizes))
        self.class_names = [printable_name(name) for name in sorted(set(classes.values()))]
        self._labels = {name: sorted(set(classes.values())).index(directory) for name, directory in classes.items()}
        self._index = lru_cache(maxsize=4)(self._scan)  # a shard spans few tars
        self._contents: dict[str, Contents] = {}  # of the tars that this process counted
        self._rows = RowIndex(files, max_images, counts_file, lambda name: self._count(name).items)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, stop: int) -> Iterator[Item]:
        row = start
        for name, first, end in self._rows.spans(start, stop):
            items = self._index(name).items
            if len(items) != self._rows.count(name):
                raise ValueError(
                    f"source {self._files.url!r}: {name} has {len(items)} items, but had {self._rows.count(name)} when "
                    "they were counted; restore the file or create another dataset"
                )
            with self._files.system.open(self._files.path(name), "rb") as file:
                for key, members in items[first:end]:
                    parts = {kind: _read(file, member) for kind, member in members.items()}
                    yield self._item(name, key, parts, row)
                    row += 1

    def contents(self) -> Contents:
        """Count what the tars hold and what is left out of them."""
        return merged(self._contents.get(name) or self._count(name) for name in self._files.sizes)

    def _count(self, name: str) -> Contents:
        """Count the items of a tar; read its labels, and its texts up to the first words."""
        index = self._index(name)
        counts = Contents(items=len(index.items), left_out=index.left_out)
        with self._files.system.open(self._files.path(name), "rb") as file:
            for key, members in index.items:
                kinds = ["label"] if counts.has_words else ["label", "text", "json"]
                if "label" not in members and "json" in members:
                    kinds = ["text", "json"]
                parts = {kind: _read(file, members[kind]) for kind in kinds if kind in members}
                item = self._item(name, key, {"image": b"", **parts}, 0)
                counts.labelled += item.label >= 0
                counts.largest_label = max(counts.largest_label, item.label)
                counts.has_words = counts.has_words or bool(item.text)
        self._contents[name] = counts
        return counts

    def _item(self, name: str, key: str, parts: dict[str, bytes], row: int) -> Item:
        values, problem = parse_json(parts["json"]) if "json" in parts else ({}, "")
        text = decode_text(parts["text"]) if "text" in parts else ""
        if text:
            problem = ""
        elif not problem:
            text, problem = first_caption(
                (values.get(caption) for caption in caption_names(self._columns)), self._seed, row
            )
        if "label" in parts:
            label, label_problem = label_of(parts["label"])
        else:
            label = next(
                (label for key in label_names(self._columns) if (label := label_of(values.get(key))[0]) >= 0), -1
            )
            label, label_problem = label if label >= 0 else self._labels.get(name, -1), ""
        text_is_class = not text and not problem and 0 <= label < len(self.class_names)
        return Item(
            id=printable_name(f"{name}:{key}"),
            data=parts["image"],
            label=label,
            text=class_phrase(self.class_names[label]) if text_is_class else text,
            text_is_class=text_is_class,
            label_problem=label_problem,
            text_problem=problem,
        )

    def _scan(self, name: str) -> TarIndex:
        try:
            with self._files.system.open(self._files.path(name), "rb") as file:
                return scan_tar(file)
        except (tarfile.ReadError, ValueError, OverflowError, MemoryError) as error:  # of lengths that make no sense
            raise ValueError(f"source {self._files.url!r}: {name} is not a complete tar file: {error}") from None


def _classes_by_tar(names: list[str]) -> dict[str, str]:
    """Return the class of each tar, if all are named after one: a WordNet id, or words without a number."""
    stems = {name: PurePosixPath(name).stem for name in names}
    by_id = all(WORDNET_ID.fullmatch(stem) for stem in stems.values())
    by_words = len(set(stems.values())) > 1 and not any(re.search(r"\d", stem) for stem in stems.values())
    splits = by_words and any(stem.lower() in SPLITS for stem in stems.values())
    return stems if by_id or (by_words and not splits) else {}


def _read(file: Any, member: Member) -> bytes:
    offset, size = member
    file.seek(offset)
    return file.read(size)
