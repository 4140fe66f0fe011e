"""An image source of files in a folder, with subfolders as classes."""

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from pixart.config.dataset import ColumnsConfig
from pixart.data.listing.blocks import Reader
from pixart.data.listing.file_list import FileList
from pixart.data.listing.folder_table import TEXT_SIDECARS, Sidecar
from pixart.data.sources.base import Item, class_phrase, printable_name
from pixart.data.sources.contents import Contents
from pixart.data.sources.folder_index import ImageRow
from pixart.data.sources.texts import caption_names, decode_text, first_caption, parse_json, pick

MAX_IMAGE = 1 << 30  # bytes of a file that is read as an image
MAX_SIDECAR = 1 << 24  # bytes of a file with words
UNREADABLE = (PermissionError, IsADirectoryError)  # of one file; a file that is missing means that the source changed


class FolderSource:
    """Image files whose class is the name of their folder; `listing` has an ImageRow for each.

    Images beside the class folders have no class, nor have those in a folder of a split (`train`) or of a shard
    (`00000`), nor those of a folder with metadata files, which name the classes themselves. The text of an item is its
    caption in the metadata, or a .txt, .caption or .json file of the same name, or else the name of its class. One
    caption of several is chosen by `seed`.
    """

    batch_size = 32  # files requested together, which remote file systems fetch concurrently

    def __init__(self, files: FileList, listing: Reader, seed: int = 0, columns: ColumnsConfig | None = None):
        self._files, self._listing, self._seed = files, listing, seed
        self._columns = columns or ColumnsConfig()
        self.class_names: list[str] = listing.header["class_names"]

    def __len__(self) -> int:
        return self._listing.rows

    def read(self, start: int, stop: int) -> Iterator[Item]:
        """Yield the items of a range.

        Raises ValueError if an image or a text no longer exists.
        """
        for first in range(start, min(stop, len(self)), self.batch_size):
            rows = list(self._rows(first, min(first + self.batch_size, stop)))
            names = [row.name for row in rows if row.size <= MAX_IMAGE]
            sidecars = [sidecar.name for row in rows if not row.captions for sidecar in _readable(row.sidecars)]
            contents = self._fetch([*names, *sidecars])
            for number, row in enumerate(rows, first):
                yield self._item(row, contents, number)

    def contents(self) -> Contents:
        """Count what the folder holds and what is left out of it. Reads texts up to the first words."""
        counts = Contents.from_record(self.listing_record)
        counts.has_words = bool(counts.labelled and self.class_names) or any(
            self._caption(row, self._fetch([sidecar.name for sidecar in _readable(row.sidecars)]), 0)[0]
            for row in self._rows(0, len(self))
            if row.captions or row.sidecars
        )
        return counts

    @property
    def listing_record(self) -> Mapping[str, Any]:
        return self._listing.header["contents"]

    def _rows(self, start: int, stop: int) -> Iterator[ImageRow]:
        for name, size, sidecars, label, captions in self._listing.read(start, stop):
            yield ImageRow(name, size, [Sidecar(*sidecar) for sidecar in sidecars], label, captions)

    def _item(self, row: ImageRow, contents: Mapping[str, bytes | str], number: int) -> Item:
        data = contents.get(row.name, f"has {row.size} bytes; the limit is {MAX_IMAGE}")
        text, problem = self._caption(row, contents, number)
        text_is_class = not text and not problem and 0 <= row.label < len(self.class_names)
        return Item(
            id=printable_name(row.name),
            data=data if isinstance(data, bytes) else b"",
            label=row.label,
            text=class_phrase(self.class_names[row.label]) if text_is_class else text,
            text_is_class=text_is_class,
            image_problem="" if isinstance(data, bytes) else f"its file {data}",
            text_problem=problem,
        )

    def _caption(self, row: ImageRow, contents: Mapping[str, bytes | str], number: int) -> tuple[str, str]:
        """Return the caption of an image and "", or "" and what is wrong with it."""
        names = caption_names(self._columns)
        if row.captions:
            return first_caption(pick(row.captions, names), self._seed, number)
        problem = ""
        for sidecar in row.sidecars:
            suffix = PurePosixPath(sidecar.name).suffix.lower()
            content = contents.get(sidecar.name, f"has {sidecar.size} bytes; the limit is {MAX_SIDECAR}")
            if isinstance(content, str):
                text, wrong = "", f"its {suffix} file {content}"
            elif suffix in TEXT_SIDECARS:
                text, wrong = first_caption([("", decode_text(content))], self._seed, number)
            else:
                values, wrong = parse_json(content)
                text, wrong = ("", wrong) if wrong else first_caption(pick(values, names), self._seed, number)
            if text:
                return text, ""
            problem = problem or wrong
        return "", problem

    def _fetch(self, names: list[str]) -> dict[str, bytes | str]:
        """Return the content of each file, or why it cannot be read. Raises ValueError for one that is missing."""
        if not names:
            return {}
        paths = [self._files.path(name) for name in names]
        contents = self._files.system.cat_ranges(paths, 0, None, on_error="return")
        for name, content in zip(names, contents, strict=True):
            if isinstance(content, FileNotFoundError):
                raise ValueError(
                    f"source {self._files.url!r}: {printable_name(name)} is missing, but was there when it was listed; "
                    "restore the source or create another dataset"
                )
            if isinstance(content, Exception) and not isinstance(content, UNREADABLE):
                raise content
        return {
            name: f"cannot be read: {content.strerror}" if isinstance(content, OSError) else content
            for name, content in zip(names, contents, strict=True)
        }


def _readable(sidecars: list[Sidecar]) -> list[Sidecar]:
    return [sidecar for sidecar in sidecars if sidecar.size <= MAX_SIDECAR]
