"""An image source of tar files in the layout of WebDataset: members that share a name up to its first dot are one item.

`KEY.jpg`, `.jpeg`, `.png` or `.webp` is the image. Optional are `KEY.cls`, the class index, and `KEY.txt` or the
"caption" of `KEY.json`, the text. Other members are ignored.
"""

import json
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from pixart.data.sources.base import Item
from pixart.data.sources.file_index import IMAGE_SUFFIXES, FileList, RowIndex

SUFFIXES = (*IMAGE_SUFFIXES, ".cls", ".txt", ".json")
Member = tuple[int, int]  # offset and size in bytes


class WebDatasetSource:
    """Items of tar files. The headers of a tar are read once; then only the required members are read."""

    def __init__(self, files: FileList, max_images: int | None, counts_file: Path | None):
        self.class_names: list[str] = []
        self._files = files
        self._index = lru_cache(maxsize=4)(self._scan)  # a shard spans few tars
        self._rows = RowIndex(files, max_images, counts_file, lambda name: len(self._index(name)))

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, start: int, stop: int) -> Iterator[Item]:
        for name, first, end in self._rows.spans(start, stop):
            with self._files.system.open(self._files.path(name), "rb") as file:
                for key, members in self._index(name)[first:end]:
                    parts = {suffix: _read(file, member) for suffix, member in members.items()}
                    yield self._item(f"{name}:{key}", parts)

    def _item(self, id: str, parts: dict[str, bytes]) -> Item:
        try:
            label = int(parts.get(".cls", b"-1"))
            text = parts[".txt"].decode() if ".txt" in parts else json.loads(parts.get(".json", b"{}")).get("caption")
            text = (text or "").strip()
        except (ValueError, AttributeError) as error:
            raise ValueError(f"source {self._files.url!r}: {id} has an unreadable class or caption: {error}") from None
        data = next(data for suffix, data in parts.items() if suffix in IMAGE_SUFFIXES)
        return Item(id=id, data=data, label=label, text=text)

    def _scan(self, name: str) -> list[tuple[str, dict[str, Member]]]:
        """Return the items of a tar in file order: (key, members by suffix)."""
        items: dict[str, dict[str, Member]] = {}
        try:
            with (
                self._files.system.open(self._files.path(name), "rb") as file,
                tarfile.open(fileobj=file, mode="r:") as tar,
            ):
                for member in tar:
                    directory, slash, base = member.name.rpartition("/")
                    stem, _, extension = base.partition(".")
                    suffix = f".{extension.lower()}"
                    if member.isfile() and stem and suffix in SUFFIXES:
                        items.setdefault(directory + slash + stem, {})[suffix] = (member.offset_data, member.size)
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("no end-of-archive block")  # tarfile accepts a cut between members
        except tarfile.ReadError as error:
            raise ValueError(f"source {self._files.url!r}: {name} is not a complete tar file: {error}") from None
        return [(key, members) for key, members in items.items() if any(suffix in members for suffix in IMAGE_SUFFIXES)]


def _read(file: Any, member: Member) -> bytes:
    offset, size = member
    file.seek(offset)
    return file.read(size)
