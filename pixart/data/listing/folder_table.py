"""The images of a folder and the files beside them, in a temporary database, so that memory does not grow with them.

Names are compared by their bytes, as file systems have them.
"""

import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from pixart.data.listing.file_list import suffix_reason

# Files with words beside an image, in the order in which they are tried.
TEXT_SIDECARS = (".txt", ".caption", ".text")
JSON_SIDECARS = (".json",)
CACHE_KIB = 8192  # memory of the database for sorting and for pages
ENTRIES = 10_000  # that are inserted together


class Sidecar(NamedTuple):
    """A file beside an image."""

    name: str
    size: int  # bytes, -1 if the file system does not report it


class FolderTable:
    """Images and sidecars of a folder: `add_image` and `add_sidecar`, then `index_files`; then `add_description`.

    `index_descriptions` comes before what reads the table.
    """

    def __init__(self, folder: Path) -> None:
        self._database = sqlite3.connect(folder / "files.sqlite", isolation_level=None)
        for statement in (
            "PRAGMA journal_mode=OFF",
            "PRAGMA synchronous=OFF",
            f"PRAGMA cache_size=-{CACHE_KIB}",
            "CREATE TABLE images (name BLOB, stem BLOB, size INTEGER)",
            "CREATE TABLE sidecars (stem BLOB, name BLOB, size INTEGER)",
            "CREATE TABLE described (name BLOB, content TEXT)",  # rows of metadata, in their order
            "BEGIN",
        ):
            self._database.execute(statement)
        self._images: list[tuple[bytes, bytes, int]] = []
        self._sidecars: list[tuple[bytes, bytes, int]] = []
        self._described: list[tuple[bytes, str]] = []

    def add_image(self, name: str, size: int) -> None:
        self._images.append((_encoded(name), _encoded(stem_of(name)), size))
        if len(self._images) == ENTRIES:
            self._flush()

    def add_sidecar(self, name: str, size: int) -> None:
        self._sidecars.append((_encoded(stem_of(name)), _encoded(name), size))
        if len(self._sidecars) == ENTRIES:
            self._flush()

    def add_description(self, name: str, content: str) -> None:
        """Add a row of metadata of an image, which need not exist."""
        self._described.append((_encoded(name), content))
        if len(self._described) == ENTRIES:
            self._flush()

    def index_files(self) -> None:
        """Sort the images and sidecars."""
        self._flush()
        for index in ("images (name, stem, size)", "images (stem)", "sidecars (stem, name, size)"):
            self._create_index(index)

    def index_descriptions(self) -> None:
        """Sort the rows of metadata."""
        self._flush()
        self._create_index("described (name)")

    def has_image(self, name: str) -> bool:
        return self._database.execute("SELECT 1 FROM images WHERE name = ?", (_encoded(name),)).fetchone() is not None

    def count_images(self) -> int:
        return self._database.execute("SELECT count(*) FROM images").fetchone()[0]

    def images(self) -> Iterator[tuple[str, int, list[Sidecar]]]:
        """Yield the name and the size of each image, and its sidecars, in the order of the names."""
        has_sidecars = self._database.execute("SELECT 1 FROM sidecars").fetchone()
        for name, stem, size in self._database.execute("SELECT name, stem, size FROM images ORDER BY name"):
            yield _decoded(name), size, self._sidecars_of(name, stem) if has_sidecars else []

    def described_images(self) -> Iterator[tuple[str, int, list[Sidecar], str]]:
        """Yield the images of the rows of metadata and the rows' contents, in their order."""
        query = (
            "SELECT images.name, images.stem, images.size, content FROM described "
            "JOIN images ON images.name = described.name ORDER BY described.rowid"
        )
        for name, stem, size, content in self._database.execute(query):
            yield _decoded(name), size, self._sidecars_of(name, stem), content

    def left_out(self) -> Counter[str]:
        """Count the sidecars without an image and, where there is metadata, what is in one of the two alone."""
        counts: Counter[str] = Counter()
        query = (
            "SELECT name FROM sidecars WHERE NOT EXISTS "
            "(SELECT 1 FROM images WHERE images.stem = sidecars.stem OR images.name = sidecars.stem)"
        )
        for (name,) in self._database.execute(query):
            counts[suffix_reason(_decoded(name))] += 1
        if self._database.execute("SELECT 1 FROM described").fetchone():
            for reason, one, other in (
                ("row of metadata without its image", "described", "images"),
                ("image without a row of metadata", "images", "described"),
            ):
                query = (
                    f"SELECT count(*) FROM {one} WHERE NOT EXISTS (SELECT 1 FROM {other} WHERE {other}.name={one}.name)"
                )
                counts[reason] += self._database.execute(query).fetchone()[0]
        return +counts

    def close(self) -> None:
        self._database.close()

    def _sidecars_of(self, name: bytes, stem: bytes) -> list[Sidecar]:
        """Return the sidecars of an image in the order in which they are tried: `a.txt`, then `a.jpg.txt`."""
        query = "SELECT stem, name, size FROM sidecars WHERE stem IN (?, ?)"
        order = (*TEXT_SIDECARS, *JSON_SIDECARS)
        entries = [
            ((order.index(PurePosixPath(_decoded(path)).suffix.lower()), owner == name), Sidecar(_decoded(path), size))
            for owner, path, size in self._database.execute(query, (stem, name))
        ]
        return [sidecar for _, sidecar in sorted(entries)]

    def _create_index(self, columns: str) -> None:
        name = columns.replace(" (", "_by_").strip(")").replace(", ", "_")
        self._database.execute(f"CREATE INDEX {name} ON {columns}")

    def _flush(self) -> None:
        self._database.executemany("INSERT INTO images VALUES (?, ?, ?)", self._images)
        self._database.executemany("INSERT INTO sidecars VALUES (?, ?, ?)", self._sidecars)
        self._database.executemany("INSERT INTO described VALUES (?, ?)", self._described)
        for rows in (self._images, self._sidecars, self._described):
            rows.clear()


def stem_of(name: str) -> str:
    """Return a name without its suffix."""
    return str(PurePosixPath(name).with_suffix(""))


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
