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
from pixart.data.listing.file_list import SPLITS, FileList
from pixart.data.sources.base import Item, class_phrase, printable_name
from pixart.data.sources.contents import Contents, merged
from pixart.data.sources.row_index import RowIndex
from pixart.data.sources.tar_index import Member, TarIndex, scan_tar
from pixart.data.sources.texts import (
    caption_names,
    caption_of,
    first_caption,
    label_names,
    label_of,
    parse_json,
    pick,
    valid_unicode,
)

MAX_IMAGE = 1 << 30  # bytes of a member that is read as an image
MAX_TEXT = 1 << 24  # bytes of any other member that is read
COMPRESSION = {b"\x1f\x8b": "gzip", b"(\xb5": "zstd", b"BZ": "bzip2", b"\xfd7": "xz"}  # by the first two bytes
Parts = dict[str, bytes | str]  # members of an item by kind, or why they are not read
WORDNET_ID = re.compile(r"n\d{8}")  # of a noun
WORD_LABEL = "label in JSON that is a word, and no integer"
# Words that name parts of a dataset, and no class.
PART_NAMES = frozenset(
    (
        *(
            "part",
            "parts",
            "shard",
            "shards",
            "chunk",
            "chunks",
            "batch",
            "split",
            "data",
            "dataset",
            "images",
            "image",
        ),
        *(
            "first",
            "second",
            "last",
            "more",
            "other",
            "others",
            "extra",
            "rest",
            "all",
            "full",
            "small",
            "large",
            "web",
        ),
        *("laion", "coco", "photos", "pictures", "real", "synthetic", "high", "low"),
    )
)


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
                    parts = {kind: _read(file, kind, member) for kind, member in members.items()}
                    yield self._item(name, key, parts, row)
                    row += 1

    def contents(self) -> Contents:
        """Count what the tars hold and what is left out of them."""
        counts = merged(self._contents.get(name) or self._count(name) for name in self._files.sizes)
        counts.left_out += self._files.left_out
        return counts

    def _count(self, name: str) -> Contents:
        """Count the items of a tar; read its labels, and its texts up to the first words."""
        index = self._index(name)
        counts = Contents(items=len(index.items), left_out=index.left_out)
        with self._files.system.open(self._files.path(name), "rb") as file:
            for key, members in index.items:
                kinds = ["label"] if counts.has_words else ["label", "text", "json"]
                if "label" not in members and "json" in members:
                    kinds = ["text", "json"]
                parts = {kind: _read(file, kind, members[kind]) for kind in kinds if kind in members}
                item = self._item(name, key, {"image": b"", **parts}, 0)
                counts.labelled += item.label >= 0
                counts.left_out[WORD_LABEL] += item.label < 0 and bool(self._word(parts))
                counts.largest_label = max(counts.largest_label, item.label)
                counts.has_words = counts.has_words or bool(item.text)
        counts.left_out = +counts.left_out
        self._contents[name] = counts
        return counts

    def _item(self, name: str, key: str, parts: Parts, row: int) -> Item:
        text, problem = self._text(parts, row)
        label, label_problem = self._label(name, parts)
        text_is_class = not text and not problem and 0 <= label < len(self.class_names)
        if not text and not problem and not text_is_class and (word := self._word(parts)):
            text, text_is_class, label_words = word, True, word
        else:
            label_words = self.class_names[label] if text_is_class else ""
        image = parts["image"]
        return Item(
            id=printable_name(f"{name}:{key}"),
            data=image if isinstance(image, bytes) else b"",
            label=label,
            text=class_phrase(label_words) if text_is_class else text,
            text_is_class=text_is_class,
            image_problem=image if isinstance(image, str) else "",
            label_problem=label_problem,
            text_problem=problem,
        )

    def _text(self, parts: Parts, row: int) -> tuple[str, str]:
        """Return the caption of an item and "", or "" and what is wrong with it."""
        stored, names = parts.get("text", b""), caption_names(self._columns)
        text, problem = ("", stored) if isinstance(stored, str) else caption_of(stored, self._seed, row)
        if text or "json" not in parts:
            return text, problem
        values, wrong = _json_of(parts)
        if not wrong:
            text, wrong = first_caption(pick(values, names), self._seed, row)
        return text, "" if text else problem or wrong

    def _label(self, name: str, parts: Parts) -> tuple[int, str]:
        """Return the label of an item and "", or -1 and what is wrong with it."""
        if "label" in parts:
            stored = parts["label"]
            return (-1, stored) if isinstance(stored, str) else label_of(stored)
        labels = [label_of(value) for _, value in pick(_json_of(parts)[0], label_names(self._columns))]
        label = next((label for label, _ in labels if label >= 0), self._labels.get(name, -1))
        problems = [problem for _, problem in labels if problem] if self._columns.label else []
        return label, "" if label >= 0 or not problems else problems[0]

    def _word(self, parts: Parts) -> str:
        """Return the label of an item's JSON if it is a word, which names no index; otherwise an empty text."""
        if self._columns.label or "label" in parts:
            return ""
        values = (value for _, value in pick(_json_of(parts)[0], label_names(self._columns)))
        return next((valid_unicode(value) for value in values if isinstance(value, str) and label_of(value)[1]), "")

    def _scan(self, name: str) -> TarIndex:
        try:
            with self._files.system.open(self._files.path(name), "rb") as file:
                if kind := COMPRESSION.get(file.read(2)):
                    raise ValueError(f"it is compressed by {kind}; decompress it")
                return scan_tar(file, self._columns)
        except (tarfile.TarError, ValueError, ArithmeticError, LookupError, MemoryError) as error:  # of damaged headers
            line = " ".join(str(error).split())
            raise ValueError(f"source {self._files.url!r}: {name} is not a complete tar file: {line}") from None


def _classes_by_tar(names: list[str]) -> dict[str, str]:
    """Return the class of each tar, if all are named after one: a WordNet id, or words without a number."""
    stems = {name: PurePosixPath(name).stem for name in names}
    by_id = all(WORDNET_ID.fullmatch(stem) for stem in stems.values())
    by_words = len(set(stems.values())) > 1 and all(_is_class_name(stem) for stem in stems.values())
    splits = by_words and any(stem.lower() in SPLITS for stem in stems.values())
    return stems if by_id or (by_words and not splits) else {}


def _is_class_name(stem: str) -> bool:
    """Return whether the name of a tar may be that of a class: words without a number, and no name of a part."""
    words = [word for word in re.split(r"[^\w]|_", stem.lower()) if word]
    has_letters = len(max(words, key=len, default="")) > 2
    return has_letters and not re.search(r"\d", stem) and not PART_NAMES & set(words)


def _json_of(parts: Parts) -> tuple[dict[str, Any], str]:
    """Return the object of an item's JSON and "", or an empty one and what is wrong with it."""
    stored = parts.get("json", b"{}")
    return ({}, stored) if isinstance(stored, str) else parse_json(stored)


def _read(file: Any, kind: str, member: Member) -> bytes | str:
    """Return the content of a member, or why it is not read."""
    offset, size = member
    limit = MAX_IMAGE if kind == "image" else MAX_TEXT
    if size > limit:
        return f"its {kind} has {size} bytes; the limit is {limit}"
    file.seek(offset)
    return file.read(size)
