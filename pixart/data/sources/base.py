"""Image sources by URL: rows in a fixed order, any range of which is read without the rest.

The order is that of the sorted names, so that row r is the same item in every process, as long as no file is added.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One row of a source."""

    id: str  # relative path, "file:row" or "tar:key": names the source's row for ever
    data: bytes  # the encoded image as stored
    label: int  # class index, -1 where the source has none
    text: str  # the source's own words, "" where it has none
    text_is_class: bool = False  # `text` is the name of the class, not a caption


class Source(Protocol):
    class_names: list[str]  # by label; empty where the source names no classes

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[Item]:
        """Rows start to stop - 1, as far as there are any."""
        ...


def unicode(name: str) -> str:
    """A file's name as text; bytes of it that are none are written out."""
    return os.fsencode(name).decode(errors="backslashreplace")


def class_text(name: str) -> str:
    """The name of a class as words."""
    return name.replace("_", " ")
