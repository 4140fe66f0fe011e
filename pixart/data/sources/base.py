"""The interface of image sources: ordered collections of items with random access to ranges.

Items are ordered by name, so row r is the same item in every process, as long as no file is added.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from pixart.data.sources.contents import Contents


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """One item of a source: an encoded image with its label and text."""

    id: str  # relative path, "file:row" or "tar:key"; a permanent name of the item
    data: bytes  # the encoded image as stored
    label: int  # class index, -1 if the source has no labels
    text: str  # the caption or class name in the source, "" if it has neither
    text_is_class: bool = False  # `text` is the name of the class, not a caption
    image_problem: str = ""  # why the image could not be read; `data` is empty then
    label_problem: str = ""  # why the label could not be read; `label` is -1 then
    text_problem: str = ""  # why the text could not be read; `text` is "" then


class Source(Protocol):
    """An ordered collection of items."""

    class_names: list[str]  # by label; empty if the source does not name its classes

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> Iterator[Item]:
        """Yield the items of rows start to stop - 1, or up to the last row."""
        ...

    def contents(self) -> Contents:
        """Count what the source holds and what is left out of it."""
        ...


def printable_name(name: str) -> str:
    """Return a file name as valid Unicode; bytes that are not UTF-8 are written as escape sequences."""
    return os.fsencode(name).decode(errors="backslashreplace")


def class_phrase(name: str) -> str:
    """Return the name of a class as words separated by spaces."""
    return name.replace("_", " ")
