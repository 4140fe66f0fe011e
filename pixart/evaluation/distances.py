"""Distances between the features of generated images and of a reference.

All are plain functions of features or of their moments. `frechet` needs the moments of all images alone, the others
need single features, of which statistics keep a sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import linalg

from pixart.evaluation.statistics import FeatureStatistics

KERNEL_DEGREE, KERNEL_OFFSET = 3, 1.0  # of KID's polynomial kernel (Bińkowski et al., arXiv:1801.01401)
NEIGHBORS = 5  # of density and coverage (Naeem et al., arXiv:2002.09797)
PRECISION_NEIGHBORS = 3  # of precision and recall (Kynkäänniemi et al., arXiv:1904.06991)
DIRECTIONS = 512  # of the sliced Wasserstein distance
DIRECTIONS_SEED = 0
BLOCK = 1024  # rows of a distance matrix that are computed at a time


def frechet(generated: FeatureStatistics, reference: FeatureStatistics) -> float:
    """Return the Fréchet distance of two Gaussians with these moments (Heusel et al., arXiv:1706.08500)."""
    return frechet_of_moments(generated.mean, generated.covariance, reference.mean, square_root(reference.covariance))


def frechet_of_moments(mean: np.ndarray, covariance: np.ndarray, other: np.ndarray, root: np.ndarray) -> float:
    """Return the Fréchet distance to a Gaussian with the mean `other` and the square root `root` of its covariance.

    The trace of (C1 C2)^(1/2) is the sum of the square roots of the eigenvalues of the symmetric R C1 R, R = C2^(1/2).
    """
    product = root @ covariance @ root
    eigenvalues = linalg.eigvalsh((product + product.T) / 2)
    trace_root = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    return float(np.sum((mean - other) ** 2) + np.trace(covariance) + np.sum(root * root.T) - 2 * trace_root)


def square_root(covariance: np.ndarray) -> np.ndarray:
    """Return the symmetric square root of a covariance; eigenvalues below 0 by rounding count as 0."""
    values, vectors = linalg.eigh((covariance + covariance.T) / 2)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def polynomial_kernel(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return KID's kernel (n, m) of features (n, dim) and (m, dim)."""
    return (left @ right.T / left.shape[1] + KERNEL_OFFSET) ** KERNEL_DEGREE


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernels:
    """Kernel matrices of generated and reference features, from which KID and its replicates follow."""

    within: np.ndarray  # (n, n), among generated images, with 0 on the diagonal
    across: np.ndarray  # (n,): mean over the reference of the kernel with each generated image
    reference: float  # mean over pairs of different reference images

    @classmethod
    def compute(cls, generated: np.ndarray, reference: np.ndarray) -> "Kernels":
        """Compute the kernels of features (n, dim) and (m, dim)."""
        generated, reference = generated.astype(np.float64), reference.astype(np.float64)
        within = polynomial_kernel(generated, generated)
        np.fill_diagonal(within, 0)
        across = np.zeros(len(generated))
        among = 0.0
        for rows in blocks(len(reference)):
            across += polynomial_kernel(generated, reference[rows]).sum(axis=1)
            kernel = polynomial_kernel(reference[rows], reference)
            among += kernel.sum() - kernel[np.arange(len(kernel)), np.arange(rows.start, rows.stop)].sum()
        count = len(reference)
        return cls(within=within, across=across / count, reference=float(among / (count * (count - 1))))

    def kid(self, weights: np.ndarray | None = None) -> float:
        """Return the unbiased squared MMD; `weights` (n,) says how often each generated image counts."""
        weights = np.ones(len(self.across)) if weights is None else weights
        pairs = weights.sum() ** 2 - np.sum(weights**2)
        within = weights @ self.within @ weights / pairs
        return float(within + self.reference - 2 * (weights @ self.across) / weights.sum())


@dataclass(frozen=True, kw_only=True, slots=True)
class Neighborhoods:
    """Per image, what precision, density (generated), recall and coverage (reference) are the means of."""

    precision: np.ndarray  # (n,): 1 where a generated image lies in the ball of a reference image
    density: np.ndarray  # (n,): number of balls of the reference that hold the image, divided by NEIGHBORS
    recall: np.ndarray  # (m,): 1 where a reference image lies in the ball of a generated image
    coverage: np.ndarray  # (m,): 1 where the ball of a reference image holds a generated image

    @classmethod
    def compute(cls, generated: np.ndarray, reference: np.ndarray) -> "Neighborhoods":
        """Compute them for features (n, dim) and (m, dim). A ball reaches to the k-th nearest image of its set.

        Raises ValueError if a set has too few images for its balls.
        """
        if min(len(generated), len(reference)) <= NEIGHBORS:
            raise ValueError(
                f"{min(len(generated), len(reference))} images: precision, recall, density and coverage need more than "
                f"{NEIGHBORS} in each set"
            )
        generated, reference = generated.astype(np.float64), reference.astype(np.float64)
        of_reference, of_generated = radii(reference), radii(generated)
        precision, density = np.zeros(len(generated)), np.zeros(len(generated))
        recall, coverage = np.zeros(len(reference), bool), np.zeros(len(reference), bool)
        for rows in blocks(len(generated)):
            distances = squared_distances(generated[rows], reference)
            precision[rows] = (distances <= of_reference[PRECISION_NEIGHBORS]).any(axis=1)
            within = distances <= of_reference[NEIGHBORS]
            density[rows] = within.sum(axis=1) / NEIGHBORS
            coverage |= within.any(axis=0)
            recall |= (distances <= of_generated[PRECISION_NEIGHBORS][rows, None]).any(axis=0)
        return cls(precision=precision, density=density, recall=recall.astype(float), coverage=coverage.astype(float))


def radii(features: np.ndarray) -> dict[int, np.ndarray]:
    """Return the squared distance (n,) of each image to its k-th nearest other image, for both numbers k."""
    needed = (PRECISION_NEIGHBORS, NEIGHBORS)
    result = {k: np.zeros(len(features)) for k in needed}
    for rows in blocks(len(features)):
        distances = squared_distances(features[rows], features)
        distances[np.arange(len(distances)), np.arange(rows.start, rows.stop)] = 0  # not exact by cancellation
        nearest = np.partition(distances, needed, axis=1)
        for k in needed:
            result[k][rows] = nearest[:, k]
    return result


def squared_distances(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the squared Euclidean distances (n, m) of features (n, dim) and (m, dim)."""
    squares = np.sum(left**2, axis=1)[:, None] + np.sum(right**2, axis=1)
    return np.maximum(squares - 2 * left @ right.T, 0)


def blocks(count: int) -> Iterator[slice]:
    """Yield slices of at most BLOCK rows that cover `count` rows."""
    for start in range(0, count, BLOCK):
        yield slice(start, min(start + BLOCK, count))


def sliced_wasserstein(generated: np.ndarray, reference: np.ndarray) -> float:
    """Return the squared sliced Wasserstein-2 distance of features (n, dim) and (m, dim), times `dim`.

    This is the distance of MIND (Berthet et al., arXiv:2605.06797), which needs far fewer images than the Fréchet
    distance: the mean over DIRECTIONS fixed directions of the one-dimensional distances, which sorting gives.
    """
    return float(projected_distances(project(generated), project(reference)).mean() * generated.shape[1])


def project(features: np.ndarray) -> np.ndarray:
    """Return the projections (n, DIRECTIONS) of features (n, dim) onto fixed random unit vectors."""
    directions = np.random.default_rng(DIRECTIONS_SEED).standard_normal((features.shape[1], DIRECTIONS))
    return features.astype(np.float64) @ (directions / np.linalg.norm(directions, axis=0))


def projected_distances(generated: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Return the squared Wasserstein-2 distance (d,) of each column of (n, d) and (m, d).

    Both quantile functions are compared at the midpoints of max(n, m) equal parts of [0, 1].
    """
    count = max(len(generated), len(reference))
    at = (np.arange(count) + 0.5) / count
    quantiles = [
        np.sort(one, axis=0)[np.minimum((at * len(one)).astype(int), len(one) - 1)] for one in (generated, reference)
    ]
    return np.mean((quantiles[0] - quantiles[1]) ** 2, axis=0)
