"""Statistics over all caption parts of a dataset, and the checks of an audit."""

import zlib
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pixart.config.dataset import AuditConfig
from pixart.data.audit.deduplication import exact_groups, near_groups
from pixart.data.images.screening import Reason

MAX_EXAMPLES = 24  # rejected images shown per reason
NUM_BY_LENGTH = 8  # longest captions shown, and shortest
NUM_FIRST_WORDS = 20  # entries in the list of most common first words
BINS = {
    "brightness": np.linspace(0, 1, 41),
    "entropy": np.linspace(0, 8, 41),  # bits
    "shorter side": 2.0 ** np.arange(4, 14.25, 0.25),  # pixels
    "aspect": np.linspace(1, 5, 41),  # longer over shorter side
    "words": np.arange(0, 122, 2),  # per caption
}
WORDS = "words"  # the one of them that is measured without images


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectedExample:
    """A rejected row; `thumbnail` is a JPEG, empty if the image could not be decoded."""

    id: str
    detail: str
    thumbnail: bytes


class Audit:
    """Statistics of a dataset, accumulated over its caption parts in the order of their shards.

    Without `has_images`, which adopted datasets have not, they are those of the captions alone.
    """

    def __init__(self, *, has_images: bool = True) -> None:
        self.has_images = has_images
        self.rows = self.valid = 0
        self.reasons: Counter[str] = Counter()
        self.rejected: dict[str, list[tuple[int, RejectedExample]]] = {}
        self.histograms = {
            name: np.zeros(len(BINS[name]) - 1, dtype=np.int64) for name in BINS if has_images or name == WORDS
        }
        self.first_words: Counter[str] = Counter()
        self.empty_captions = 0  # valid rows without a caption
        self.by_length: list[tuple[int, int]] = []  # number of words and row, of the longest and the shortest captions
        self.digests: list[np.ndarray] = []
        self.phashes: list[np.ndarray] = []
        self.valid_rows: list[np.ndarray] = []

    def add(self, table: pa.Table, first_row: int) -> None:
        """Add the caption part whose first row is `first_row` of the dataset."""
        valid = table["valid"].to_numpy()
        self.rows += len(valid)
        self.valid += int(valid.sum())
        for row in np.flatnonzero(~valid):
            self.add_rejected(table.slice(row, 1).to_pylist()[0])
        accepted = table.filter(pa.array(valid))
        captions = accepted["caption"].to_pylist()
        lengths = np.array([len(caption.split()) for caption in captions], dtype=np.int64)
        self.add_histogram(WORDS, lengths)
        self.empty_captions += int((lengths == 0).sum())
        rows = first_row + np.flatnonzero(valid)
        self.valid_rows.append(rows)
        known = [*self.by_length, *zip(lengths[lengths > 0].tolist(), rows[lengths > 0].tolist(), strict=True)]
        known.sort()
        self.by_length = known[:NUM_BY_LENGTH] + known[NUM_BY_LENGTH:][-NUM_BY_LENGTH:]
        if self.has_images:
            self.first_words.update(first_three_words(caption) for caption in captions)
            self.add_images(accepted)
        else:
            self.first_words.update(first_three_words(caption) for caption in captions if caption)

    def add_images(self, accepted: pa.Table) -> None:
        """Add the statistics of the images of valid rows."""
        width, height = (accepted[name].to_numpy().astype(np.float64) for name in ("width", "height"))
        self.add_histogram("brightness", accepted["brightness"].to_numpy())
        self.add_histogram("entropy", accepted["entropy"].to_numpy())
        self.add_histogram("shorter side", np.minimum(width, height))
        self.add_histogram("aspect", np.maximum(width, height) / np.maximum(np.minimum(width, height), 1))
        self.digests.append(np.frombuffer(b"".join(accepted["digest"].to_pylist()), dtype="S16"))
        self.phashes.append(accepted["phash"].to_numpy())

    def add_histogram(self, name: str, values: np.ndarray) -> None:
        """Count values in the bins of a histogram; the outer bins include what lies beyond them."""
        edges = BINS[name]
        inside = np.clip(values, edges[0], np.nextafter(edges[-1], edges[0]))
        self.histograms[name] += np.histogram(inside, edges)[0]

    def add_rejected(self, row: dict[str, Any]) -> None:
        """Count a rejected row and keep it as an example if its id has one of the lowest hashes.

        This samples the entire dataset, and repeated audits choose the same examples.
        """
        self.reasons[row["reason"]] += 1
        examples = self.rejected.setdefault(row["reason"], [])
        example = RejectedExample(id=row["id"], detail=row["detail"], thumbnail=row["thumbnail"] or b"")
        examples.append((zlib.crc32(row["id"].encode()), example))
        if len(examples) >= 4 * MAX_EXAMPLES:
            examples.sort(key=lambda pair: pair[0])
            del examples[MAX_EXAMPLES:]

    def examples(self, reason: str) -> list[RejectedExample]:
        """Return up to MAX_EXAMPLES rows that were rejected for a reason."""
        return [example for _, example in sorted(self.rejected[reason], key=lambda pair: pair[0])[:MAX_EXAMPLES]]

    def duplicates(self) -> list[tuple[str, np.ndarray]]:
        """Return the groups of duplicate valid rows, each with its kind: all "exact" groups, then all "near" groups.

        Of each exact group, only the first row takes part in the search for near duplicates.
        """
        if not self.valid or not self.has_images:
            return []
        rows, digests, phashes = (np.concatenate(part) for part in (self.valid_rows, self.digests, self.phashes))
        exact = exact_groups(digests)
        first = np.ones(len(rows), dtype=bool)
        for group in exact:
            first[group[1:]] = False
        remaining = np.flatnonzero(first)
        near = near_groups(phashes[remaining])
        return [("exact", rows[group]) for group in exact] + [("near", rows[remaining[group]]) for group in near]


def first_three_words(caption: str) -> str:
    return " ".join(caption.lower().split()[:3])


def checks(audit: Audit, duplicates: list[tuple[str, np.ndarray]], limits: AuditConfig) -> list[dict[str, Any]]:
    """Compare the statistics with the limits; return the name, value, limit and result of each check."""
    uniform = audit.reasons[Reason.SOLID_COLOR] + audit.reasons[Reason.UNIFORM]
    redundant = sum(len(group) - 1 for _, group in duplicates)
    most_common = max(audit.first_words.values(), default=0)
    shares = {
        "rejected": ((audit.rows - audit.valid), audit.rows, limits.max_rejected),
        "solid-color or uniform": (uniform, audit.rows, limits.max_plain),
        "duplicates": (redundant, audit.valid, limits.max_duplicates),
        "captions with the same first words": (most_common, audit.valid, limits.max_same_opening),
        "empty captions": (audit.empty_captions, audit.valid, limits.max_empty_captions),
    }
    if not audit.has_images:
        del shares["solid-color or uniform"], shares["duplicates"]
    results = [
        {"name": name, "value": count / max(1, total), "limit": limit, "passed": count <= limit * total}
        for name, (count, total, limit) in shares.items()
    ]
    if audit.empty_captions == audit.valid:  # a dataset of classes
        results[-1] |= {"limit": 1.0, "passed": True}
    return [*results, {"name": "valid images", "value": audit.valid, "limit": 1, "passed": audit.valid >= 1}]


def summary(audit: Audit, duplicates: list[tuple[str, np.ndarray]], limits: AuditConfig) -> dict[str, Any]:
    """Return the results of an audit, without images, as JSON values."""
    results = checks(audit, duplicates, limits)
    kinds = {kind: [len(group) for name, group in duplicates if name == kind] for kind in ("exact", "near")}
    return {
        "passed": all(check["passed"] for check in results),
        "checks": results,
        "rows": audit.rows,
        "valid": audit.valid,
        "empty_captions": audit.empty_captions,
        "reasons": dict(audit.reasons.most_common()),
        "duplicates": {kind: {"groups": len(sizes), "rows": sum(sizes)} for kind, sizes in kinds.items()},
        "first_words": dict(audit.first_words.most_common(NUM_FIRST_WORDS)),
        "histograms": {
            name: {"edges": BINS[name].tolist(), "counts": counts.tolist()} for name, counts in audit.histograms.items()
        },
        "limits": asdict(limits),
    }
