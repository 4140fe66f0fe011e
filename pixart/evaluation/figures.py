"""All distances of one set of images to the reference, each with its interval."""

import math
from collections.abc import Sequence

import numpy as np

from pixart.evaluation import distances
from pixart.evaluation.intervals import Estimate, bootstrap, bootstrap_mean
from pixart.evaluation.statistics import FeatureStatistics


def compute(
    generated: FeatureStatistics,
    reference: FeatureStatistics,
    names: Sequence[str],
    *,
    images_per_prompt: int,
    replicates: int,
) -> dict[str, Estimate]:
    """Return the distances `names` by the names of their figures.

    The prompts are resampled, so that images of one prompt stay together; the reference is not. Raises ValueError if
    there are too few images.
    """
    rows, features = generated.rows, generated.features.astype(np.float64)
    groups = rows // images_per_prompt
    # Where only a sample of the images has features, resampling it overstates the spread of a figure of all images.
    scale = math.sqrt(len(rows) / generated.count)
    figures: dict[str, Estimate] = {}
    if "fd" in names:
        figures["fd"] = frechet(generated, reference, features, groups, scale, replicates)
    if "kid" in names:
        kernels = distances.Kernels.compute(features, reference.features)
        figures["kid"] = bootstrap(kernels.kid(), kernels.kid, groups, replicates=replicates)
    if "prdc" in names:
        shares = distances.Neighborhoods.compute(features, reference.features)
        for name in ("precision", "density"):
            figures[name] = bootstrap_mean(getattr(shares, name), groups, replicates=replicates)
        for name in ("recall", "coverage"):
            figures[name] = bootstrap_mean(getattr(shares, name), np.arange(len(reference.rows)), replicates=replicates)
    if "sliced_wasserstein" in names:
        figures["sliced_wasserstein"] = sliced_wasserstein(features, reference.features, groups, replicates)
    return figures


def frechet(
    generated: FeatureStatistics,
    reference: FeatureStatistics,
    features: np.ndarray,
    groups: np.ndarray,
    scale: float,
    replicates: int,
) -> Estimate:
    """Return the Fréchet distance of all images, with the interval from their sampled features (n, dim)."""
    if min(generated.count, reference.count) <= generated.dim:
        raise ValueError(
            f"{min(generated.count, reference.count)} images: the Fréchet distance needs more than {generated.dim} "
            f"generated and reference images for a covariance of features of width {generated.dim}"
        )
    root = distances.square_root(reference.covariance)

    def replicate(weights: np.ndarray) -> float:
        mean = weights @ features / weights.sum()
        centered = features - mean
        covariance = (centered * weights[:, None]).T @ centered / (weights.sum() - 1)
        return distances.frechet_of_moments(mean, covariance, reference.mean, root)

    value = distances.frechet_of_moments(generated.mean, generated.covariance, reference.mean, root)
    return bootstrap(value, replicate, groups, replicates=replicates, scale=scale, count=generated.count)


def sliced_wasserstein(generated: np.ndarray, reference: np.ndarray, groups: np.ndarray, replicates: int) -> Estimate:
    """Return the sliced Wasserstein distance of features (n, dim) and (m, dim), times dim."""
    projected, target = distances.project(generated), distances.project(reference)

    def replicate(weights: np.ndarray) -> float:
        resampled = np.repeat(projected, weights.astype(int), axis=0)
        return float(distances.projected_distances(resampled, target).mean() * generated.shape[1])

    return bootstrap(replicate(np.ones(len(groups))), replicate, groups, replicates=replicates)
