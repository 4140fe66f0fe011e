"""Seconds from a fault until all data is complete, as a table at the end of the test session."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

RECOVERY = "recovery"  # a property of a test: the fault, the kind of job and the seconds


def table(properties: Iterable[tuple[str, Any]]) -> list[str]:
    """Return the lines of the table, a row per fault and a column per kind of job; empty without recovery times."""
    times: dict[str, dict[str, float]] = {}
    for name, value in properties:
        if name == RECOVERY:
            fault, kind, seconds = value
            times.setdefault(fault, {})[kind] = seconds
    kinds = sorted({kind for row in times.values() for kind in row})
    return list(lines(times, kinds)) if times else []


def lines(times: dict[str, dict[str, float]], kinds: Sequence[str]) -> Iterator[str]:
    yield f"{'fault':<20}" + "".join(f"{kind:>12}" for kind in kinds)
    for fault, row in times.items():
        cells = (f"{row[kind]:.0f} s" if kind in row else "-" for kind in kinds)
        yield f"{fault:<20}" + "".join(f"{cell:>12}" for cell in cells)
