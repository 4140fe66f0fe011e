"""Row indices of files that contain many items."""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from pathlib import Path

from pixart import records
from pixart.atomic import write_atomically
from pixart.data.listing.file_list import ALLOWED, FileList
from pixart.records import Count

Counts = dict[str, tuple[Count, Count]]  # bytes and rows of each file


class RowIndex:
    """Assigns consecutive rows to files that contain many items each.

    `count_rows` opens a file and returns its number of rows; results are kept in `counts_file`, if given.
    Raises ValueError if the files have no rows.
    """

    def __init__(
        self, files: FileList, max_images: int | None, counts_file: Path | None, count_rows: Callable[[str], int]
    ):
        known = records.read(counts_file, Counts) if counts_file and counts_file.exists() else {}
        missing = [name for name, size in files.sizes.items() if known.get(name, [None])[0] != size]
        with ThreadPoolExecutor(16) as threads:
            counts = threads.map(count_rows, missing)
            known |= {name: [files.sizes[name], rows] for name, rows in zip(missing, counts, strict=True)}
        if counts_file and missing:
            write_atomically(counts_file, json.dumps({name: known[name] for name in files.sizes}))
        self._names = list(files.sizes)
        self._counts = {name: known[name][1] for name in self._names}
        self._ends = [0, *accumulate(self._counts.values())]
        self._rows = min(self._ends[-1], max_images or self._ends[-1])
        if not self._rows:
            raise ValueError(f"source {files.url!r}: its files contain no images; {ALLOWED}")

    def __len__(self) -> int:
        return self._rows

    def count(self, name: str) -> int:
        """Return the number of rows of a file."""
        return self._counts[name]

    def spans(self, start: int, stop: int) -> Iterator[tuple[str, int, int]]:
        """Yield the files that contain rows start to stop - 1, each with the range of its rows to read."""
        stop = min(stop, self._rows)
        for name, (first, end) in zip(self._names, pairwise(self._ends), strict=True):
            if max(start, first) < min(stop, end):
                yield name, max(start, first) - first, min(stop, end) - first
