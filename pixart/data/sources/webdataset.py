"""Images in tar files, in the layout of WebDataset: members of one name up to its first dot make one item.

`KEY.jpg`, `.jpeg`, `.png` or `.webp` is the image, `KEY.cls` the class index, and `KEY.txt` or the "caption" of
`KEY.json` the text; the last three are optional, and other members are left alone.
"""

import json
import tarfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from pixart.data.sources.base import Item
from pixart.data.sources.file_index import IMAGE_SUFFIXES, Files, RowsOfFiles

SUFFIXES = (*IMAGE_SUFFIXES, ".cls", ".txt", ".json")
Member = tuple[int, int]  # where its bytes begin, and how many there are


class WebDatasetSource:
    """Looks through a tar's headers once, then seeks to the members of the range."""

    def __init__(self, files: Files, images: int | None, counts: Path | None):
        self.class_names: list[str] = []
        self._files = files
        self._index = lru_cache(maxsize=4)(self._scan)  # a range lies in few tars
        self._rows = RowsOfFiles(files, images, counts, lambda name: len(self._index(name)))

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
            raise ValueError(f"source {self._files.url!r}: {id} has no readable class or caption: {error}") from None
        data = next(data for suffix, data in parts.items() if suffix in IMAGE_SUFFIXES)
        return Item(id=id, data=data, label=label, text=text)

    def _scan(self, name: str) -> list[tuple[str, dict[str, Member]]]:
        """The items of a tar in its own order: (key, members by suffix)."""
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
                    raise tarfile.ReadError("it has no end")  # which tarfile alone lets pass: cut between two members
        except tarfile.ReadError as error:
            raise ValueError(f"source {self._files.url!r}: {name} is not a whole tar file: {error}") from None
        return [(key, members) for key, members in items.items() if any(suffix in members for suffix in IMAGE_SUFFIXES)]


def _read(file: Any, member: Member) -> bytes:
    offset, size = member
    file.seek(offset)
    return file.read(size)
