"""What a source holds and what it leaves out, as `init` reports it and stores it with the dataset."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True, slots=True)
class Contents:
    """Counts over the files of a source; those of several files are added by `merge`."""

    items: int = 0
    labelled: int = 0  # items that have a label
    left_out: Counter[str] = field(default_factory=Counter)  # by reason
    largest_label: int = -1  # -1 if no item has a label
    has_words: bool = False  # whether any item has a caption or the name of a class
    columns: dict[str, list[str]] = field(default_factory=dict)  # taken for image, caption and label

    def merge(self, other: "Contents") -> None:
        """Add the counts of further files."""
        self.items += other.items
        self.labelled += other.labelled
        self.left_out.update(other.left_out)
        self.largest_label = max(self.largest_label, other.largest_label)
        self.has_words = self.has_words or other.has_words
        for role, names in other.columns.items():
            known = self.columns.setdefault(role, [])
            known += [name for name in names if name not in known]

    def record(self) -> dict[str, Any]:
        """Return the counts as JSON values."""
        return {
            "items": self.items,
            "labelled": self.labelled,
            "left_out": dict(sorted(self.left_out.items())),
            "largest_label": self.largest_label,
            "has_words": self.has_words,
            "columns": self.columns,
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Contents":
        """Return the counts that `record` has returned."""
        return cls(**{**record, "left_out": Counter(record["left_out"])})


def merged(parts: Iterable[Contents]) -> Contents:
    """Return the sum of the counts of several files."""
    total = Contents()
    for part in parts:
        total.merge(part)
    return total
