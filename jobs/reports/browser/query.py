"""Queries over the caption parts of a dataset, by DuckDB from their parquet files."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np

from jobs.state.audit_files import DUPLICATES, FOLDER

PAGE_SIZE = 48
FIGURES = ("words", "width", "height", "brightness", "entropy")  # by which rows are filtered and ordered
STATES = {
    "valid": "valid",
    "rejected": "NOT valid",
    "empty": "words = 0",
    "empty and valid": "valid AND words = 0",
}
WORDS = "CASE WHEN trim(caption) = '' THEN 0 ELSE len(string_split(trim(caption), ' ')) END"
# Columns that are kept in memory: about 200 bytes a row with captions of 30 words.
SEARCHED = (
    f"row, shard, lower(caption) AS text, {WORDS} AS words, valid, reason, label, width, height, brightness, entropy"
)
COLUMNS = f"row, shard, id, label, caption, short_caption, valid, reason, detail, width, height, {WORDS} AS words"


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """A request of the page; empty values restrict nothing."""

    words: str = ""  # all of them occur in the caption, in any order and case
    state: str = ""
    reason: str = ""
    label: int | None = None
    shard: int | None = None
    limits: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)  # figure: lowest, highest
    order: str = ""  # a figure, "-" before it for the largest first; "alike" for groups of near-duplicates
    page: int = 0


class Captions:
    """The captions of a dataset. Threads may share it; each query has a cursor of its own."""

    def __init__(self, dataset: Path, rows_per_shard: int) -> None:
        """Open the parts of a dataset. Raises ValueError if the dataset has no parts yet."""
        if not any((dataset / "captions").glob("*.parquet")):
            raise ValueError(f"dataset {dataset}: has no captions yet; run 'caption' first")
        self.lock, self.rows_per_shard = threading.Lock(), rows_per_shard
        self.connection = duckdb.connect()
        self.connection.execute("SET threads = 2")
        files = str(dataset / "captions" / "*.parquet").replace("'", "''")
        self.connection.execute(
            "CREATE VIEW parts AS SELECT *, shard * "
            f"{rows_per_shard}::BIGINT + file_row_number AS row FROM (SELECT *, "
            "CAST(regexp_extract(filename, '([0-9]+)\\.parquet$', 1) AS BIGINT) AS shard "
            f"FROM read_parquet('{files}', filename = true, file_row_number = true))"
        )
        self.connection.execute(f"CREATE TABLE captions AS SELECT {SEARCHED} FROM parts")
        self.newest: tuple[Search | None, np.ndarray] = (None, np.empty(0, dtype=np.int64))  # rows of the last search
        duplicates = dataset / FOLDER / DUPLICATES
        self.duplicates = str(duplicates).replace("'", "''") if duplicates.exists() else None

    def summary(self) -> dict[str, Any]:
        """Return the number of rows, of valid and of empty ones, the reasons with their numbers, and the labels."""
        cursor = self.cursor()
        query = (
            "SELECT count(*), count(*) FILTER (valid), count(*) FILTER (words = 0), "
            "count(*) FILTER (valid AND words = 0) FROM captions"
        )
        rows, valid, empty, unusable = cursor.execute(query).fetchone() or (0, 0, 0, 0)
        reasons = cursor.execute(
            "SELECT reason, count(*) FROM captions WHERE NOT valid GROUP BY reason ORDER BY count(*) DESC"
        ).fetchall()
        labels = cursor.execute("SELECT DISTINCT label FROM captions WHERE label >= 0 ORDER BY label").fetchall()
        return {
            "rows": rows,
            "valid": valid,
            "empty": empty,
            "empty_and_valid": unusable,
            "reasons": reasons,
            "labels": [label for (label,) in labels],
            "alike": self.duplicates is not None,
        }

    def find(self, search: Search) -> tuple[int, list[dict[str, Any]]]:
        """Return the number of rows that a search finds, and those of its page with their full texts."""
        matches = self.rows(replace(search, page=0))
        chosen = matches[PAGE_SIZE * search.page : PAGE_SIZE * (search.page + 1)].tolist()
        if not chosen:
            return len(matches), []
        places = ", ".join("?" * len(chosen))
        shards = sorted({row // self.rows_per_shard for row in chosen})
        query = f"SELECT {COLUMNS} FROM parts WHERE shard IN ({', '.join(map(str, shards))}) AND row IN ({places})"
        cursor = self.cursor().execute(query, chosen)
        names = [column[0] for column in cursor.description or ()]
        by_row = {values[0]: dict(zip(names, values, strict=True)) for values in cursor.fetchall()}
        return len(matches), [by_row[row] for row in chosen]

    def rows(self, search: Search) -> np.ndarray:
        """Return the rows that a search finds, in its order; those of the last search are kept for its other pages."""
        kept, rows = self.newest
        if kept == search:
            return rows
        source = "captions"
        if search.order == "alike":
            if self.duplicates is None:
                return np.empty(0, dtype=np.int64)
            source = f"captions JOIN read_parquet('{self.duplicates}') AS alike USING (row)"
        condition, values = condition_of(search)
        query = f"SELECT row FROM {source} WHERE {condition} {order_of(search.order)}"
        rows = self.cursor().execute(query, values).fetchnumpy()["row"]
        self.newest = (search, rows)
        return rows

    def thumbnail(self, row: int) -> bytes | None:
        """Return the JPEG that is stored with a rejected row; None without one."""
        stored = self.cursor().execute("SELECT thumbnail FROM parts WHERE row = ?", [row]).fetchone()
        return stored[0] if stored else None

    def cursor(self) -> duckdb.DuckDBPyConnection:
        with self.lock:
            return self.connection.cursor()


def condition_of(search: Search) -> tuple[str, list[Any]]:
    """Return the SQL condition of a search and the values of its placeholders. Raises ValueError for unknown names."""
    parts: list[str] = ["true"]
    values: list[Any] = []
    for word in search.words.lower().split():
        parts.append("contains(text, ?)")
        values.append(word)
    if search.state:
        if search.state not in STATES:
            raise ValueError(f"state {search.state!r}: is not known; it must be one of {', '.join(STATES)}")
        parts.append(STATES[search.state])
    for name, value in (("reason", search.reason or None), ("label", search.label), ("shard", search.shard)):
        if value is not None:
            parts.append(f"{name} = ?")
            values.append(value)
    for name, (low, high) in search.limits.items():
        for sign, limit in ((">=", low), ("<=", high)):
            if limit is not None:
                parts.append(f"{name} {sign} ?")
                values.append(limit)
    return " AND ".join(parts), values


def order_of(order: str) -> str:
    """Return the SQL clause of an order. Raises ValueError for an unknown one."""
    if not order:
        return ""
    if order == "alike":
        return 'ORDER BY alike."group", row'
    name = order.removeprefix("-")
    if name not in FIGURES:
        raise ValueError(f"order {order!r}: is not known; it must be alike or one of {', '.join(FIGURES)}")
    return f"ORDER BY {name} {'DESC' if order.startswith('-') else 'ASC'} NULLS LAST, row"
