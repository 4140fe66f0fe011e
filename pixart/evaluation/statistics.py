"""Statistics of image features that merge over shards: moments in float64, and a bounded sample of the rows.

The moments (number, sum, sum of outer products) give the mean and the covariance of all images. Distances that need
single features use the sample: the rows with the smallest hashes of their index, so that it is the same for any number
of shards. Memory is that of the outer products and of the sample, whatever the number of images.
"""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from pixart.atomic import write_atomically

HASH_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of the finalizer of SplitMix64


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureStatistics:
    """Statistics of `count` images; `rows` are the indices of the sampled ones, in ascending order."""

    count: int
    total: np.ndarray  # (dim,), float64: sum of the features
    outer: np.ndarray  # (dim, dim), float64: sum of the outer products
    rows: np.ndarray  # (sampled,), int64
    features: np.ndarray  # (sampled, dim), float32
    capacity: int  # largest number of sampled rows

    @classmethod
    def empty(cls, dim: int, capacity: int) -> Self:
        """Return the statistics of no image, with features of width `dim`."""
        return cls(
            count=0,
            total=np.zeros(dim),
            outer=np.zeros((dim, dim)),
            rows=np.zeros(0, np.int64),
            features=np.zeros((0, dim), np.float32),
            capacity=capacity,
        )

    def add(self, rows: np.ndarray, features: np.ndarray) -> Self:
        """Return the statistics with further images: row indices (B,) and features (B, dim)."""
        wide = features.astype(np.float64)
        return self.merge(
            type(self)(
                count=len(rows),
                total=wide.sum(axis=0),
                outer=wide.T @ wide,
                rows=np.asarray(rows, np.int64),
                features=features.astype(np.float32),
                capacity=self.capacity,
            )
        )

    def merge(self, other: Self) -> Self:
        """Return the statistics of both sets of images. Raises ValueError if the features differ in width."""
        if self.total.shape != other.total.shape:
            raise ValueError(f"features of width {other.dim} cannot be merged with those of width {self.dim}")
        rows = np.concatenate([self.rows, other.rows])
        features = np.concatenate([self.features, other.features])
        kept = np.arange(len(rows))
        if len(rows) > self.capacity:
            kept = np.argpartition(row_hash(rows), self.capacity)[: self.capacity]
        kept = kept[np.argsort(rows[kept])]
        return type(self)(
            count=self.count + other.count,
            total=self.total + other.total,
            outer=self.outer + other.outer,
            rows=rows[kept],
            features=features[kept],
            capacity=self.capacity,
        )

    @property
    def dim(self) -> int:
        """Width of the features."""
        return len(self.total)

    @property
    def mean(self) -> np.ndarray:
        """Mean of the features (dim,)."""
        return self.total / self.count

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance of the features (dim, dim)."""
        return (self.outer - np.outer(self.total, self.mean)) / (self.count - 1)


def row_hash(rows: np.ndarray) -> np.ndarray:
    """Return a hash (n,), uint64, of row indices (n,); different rows have different hashes."""
    value = rows.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(HASH_FACTORS[0])
    value = (value ^ (value >> np.uint64(27))) * np.uint64(HASH_FACTORS[1])
    return value ^ (value >> np.uint64(31))


def memory_bytes(dim: int, capacity: int, num_samples: int) -> int:
    """Return the memory that the distances of two sets of images need, for features of width `dim`.

    These are the moments and samples of both, their factors for the Fréchet distance, and the kernel matrices.
    """
    sampled = min(capacity, num_samples)
    return 8 * (8 * dim * dim + 3 * sampled * sampled) + 2 * 12 * sampled * dim


def to_bytes(statistics: FeatureStatistics, metadata: Mapping[str, Any]) -> bytes:
    """Return statistics, and how they were made, as the content of a NumPy file (.npz)."""
    file = io.BytesIO()
    np.savez(
        file,
        metadata=np.array(json.dumps(metadata)),
        count=statistics.count,
        capacity=statistics.capacity,
        **{name: getattr(statistics, name) for name in ("total", "outer", "rows", "features")},
    )
    return file.getvalue()


def save(statistics: FeatureStatistics, path: Path, metadata: Mapping[str, Any] | None = None) -> str:
    """Write statistics to a file atomically, and return its SHA-256."""
    content = to_bytes(statistics, metadata or {})
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def load(path: Path) -> FeatureStatistics:
    """Read statistics. Raises ValueError if the file is damaged or is another kind of file."""
    try:
        with np.load(path, allow_pickle=False) as file:
            values = {name: file[name] for name in ("count", "capacity", "total", "outer", "rows", "features")}
        return FeatureStatistics(**{**values, "count": int(values["count"]), "capacity": int(values["capacity"])})
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(
            f"{path}: holds no feature statistics ({error}); restore it, or run 'evaluate' again"
        ) from None


def merge_files(paths: list[Path]) -> FeatureStatistics:
    """Return the statistics of all shards, merged in the order of `paths`."""
    merged = load(paths[0])
    for path in paths[1:]:
        merged = merged.merge(load(path))
    return merged
