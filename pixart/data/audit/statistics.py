"""What a dataset is made of: the statistics of all its caption parts, merged, and whether they are within limits."""

import zlib
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pixart.config.audit import AuditConfig
from pixart.data.audit.deduplication import exact_groups, near_groups
from pixart.data.images.screening import Reason

SHOWN = 24  # rejected images shown by reason
OPENINGS = 20  # commonest ones that are kept
BINS = {
    "brightness": np.linspace(0, 1, 41),
    "entropy": np.linspace(0, 8, 41),  # bits
    "shorter side": 2.0 ** np.arange(4, 14.25, 0.25),  # pixels
    "aspect": np.linspace(1, 5, 41),  # longer over shorter side
    "words": np.arange(0, 122, 2),  # of a caption
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rejected:
    """A rejected row and how its image looks; `thumbnail` is empty where nothing could be decoded."""

    id: str
    detail: str
    thumbnail: bytes


class Audit:
    """Merges caption parts, one after the other in the order of their shards."""

    def __init__(self) -> None:
        self.rows = self.valid = 0
        self.reasons: Counter[str] = Counter()
        self.rejected: dict[str, list[tuple[int, Rejected]]] = {}
        self.histograms = {name: np.zeros(len(edges) - 1, dtype=np.int64) for name, edges in BINS.items()}
        self.openings: Counter[str] = Counter()
        self.digests: list[np.ndarray] = []
        self.phashes: list[np.ndarray] = []
        self.valid_rows: list[np.ndarray] = []

    def add(self, table: pa.Table, first_row: int) -> None:
        """`first_row` is the dataset's row that the part begins with."""
        valid = table["valid"].to_numpy()
        self.rows += len(valid)
        self.valid += int(valid.sum())
        for row in np.flatnonzero(~valid):
            self.add_rejected(table.slice(row, 1).to_pylist()[0])
        kept = table.filter(pa.array(valid))
        width, height = (kept[name].to_numpy().astype(np.float64) for name in ("width", "height"))
        captions = kept["caption"].to_pylist()
        values = {
            "brightness": kept["brightness"].to_numpy(),
            "entropy": kept["entropy"].to_numpy(),
            "shorter side": np.minimum(width, height),
            "aspect": np.maximum(width, height) / np.maximum(np.minimum(width, height), 1),
            "words": np.array([len(caption.split()) for caption in captions]),
        }
        for name, edges in BINS.items():
            inside = np.clip(values[name], edges[0], np.nextafter(edges[-1], edges[0]))  # the ends take what is beyond
            self.histograms[name] += np.histogram(inside, edges)[0]
        self.openings.update(opening(caption) for caption in captions)
        self.digests.append(np.frombuffer(b"".join(kept["digest"].to_pylist()), dtype="S16"))
        self.phashes.append(kept["phash"].to_numpy())
        self.valid_rows.append(first_row + np.flatnonzero(valid))

    def add_rejected(self, row: dict[str, Any]) -> None:
        """Keeps those whose id hashes lowest: the same ones, from all over the dataset, at every audit."""
        self.reasons[row["reason"]] += 1
        shown = self.rejected.setdefault(row["reason"], [])
        example = Rejected(id=row["id"], detail=row["detail"], thumbnail=row["thumbnail"] or b"")
        shown.append((zlib.crc32(row["id"].encode()), example))
        if len(shown) >= 4 * SHOWN:
            shown.sort(key=lambda pair: pair[0])
            del shown[SHOWN:]

    def examples(self, reason: str) -> list[Rejected]:
        return [example for _, example in sorted(self.rejected[reason], key=lambda pair: pair[0])[:SHOWN]]

    def duplicates(self) -> list[tuple[str, np.ndarray]]:
        """Groups of the dataset's valid rows, `exact` ones first; of what is the same the first counts for the near."""
        if not self.valid:
            return []
        rows, digests, phashes = (np.concatenate(part) for part in (self.valid_rows, self.digests, self.phashes))
        exact = exact_groups(digests)
        first = np.ones(len(rows), dtype=bool)
        for group in exact:
            first[group[1:]] = False
        left = np.flatnonzero(first)
        near = near_groups(phashes[left])
        return [("exact", rows[group]) for group in exact] + [("near", rows[left[group]]) for group in near]


def opening(caption: str) -> str:
    """The first three words."""
    return " ".join(caption.lower().split()[:3])


def checks(audit: Audit, duplicates: list[tuple[str, np.ndarray]], limits: AuditConfig) -> list[dict[str, Any]]:
    """Name, share, limit and whether it passed, of each limit."""
    plain = audit.reasons[Reason.PLAIN] + audit.reasons[Reason.NEAR_PLAIN]
    extra = sum(len(group) - 1 for _, group in duplicates)
    commonest = max(audit.openings.values(), default=0)
    shares = {
        "rejected": ((audit.rows - audit.valid), audit.rows, limits.max_rejected),
        "plain or near-plain": (plain, audit.rows, limits.max_plain),
        "duplicates": (extra, audit.valid, limits.max_duplicates),
        "same opening of a caption": (commonest, audit.valid, limits.max_same_opening),
    }
    found = [
        {"name": name, "value": count / max(1, total), "limit": limit, "passed": count <= limit * total}
        for name, (count, total, limit) in shares.items()
    ]
    return [*found, {"name": "valid images", "value": audit.valid, "limit": 1, "passed": audit.valid >= 1}]


def summary(audit: Audit, duplicates: list[tuple[str, np.ndarray]], limits: AuditConfig) -> dict[str, Any]:
    """All of the audit but the pictures, as JSON takes it."""
    found = checks(audit, duplicates, limits)
    kinds = {kind: [len(group) for name, group in duplicates if name == kind] for kind in ("exact", "near")}
    return {
        "passed": all(check["passed"] for check in found),
        "checks": found,
        "rows": audit.rows,
        "valid": audit.valid,
        "reasons": dict(audit.reasons.most_common()),
        "duplicates": {kind: {"groups": len(sizes), "rows": sum(sizes)} for kind, sizes in kinds.items()},
        "openings": dict(audit.openings.most_common(OPENINGS)),
        "histograms": {
            name: {"edges": BINS[name].tolist(), "counts": counts.tolist()} for name, counts in audit.histograms.items()
        },
        "limits": asdict(limits),
    }
