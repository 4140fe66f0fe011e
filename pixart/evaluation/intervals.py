"""Confidence intervals by the bootstrap over prompts, and the sign test of paired scores."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """A figure with its confidence interval at LEVEL, from `count` images or prompts."""

    value: float
    low: float
    high: float
    count: int


def bootstrap(
    value: float,
    replicate: Callable[[np.ndarray], float],
    groups: np.ndarray,
    *,
    replicates: int,
    seed: int = 0,
    scale: float = 1.0,
    count: int | None = None,
) -> Estimate:
    """Return a figure with the interval of its replicates under resampling of groups, such as prompts.

    `groups` (n,) is the group of each item, and `replicate` receives how often each item counts (n,), float64. The
    quantiles of the replicates are taken around their mean and moved to `value`, as resampling adds the same bias to
    all replicates of a distance. `scale` multiplies their spread; it is sqrt(n / all) where only a sample of the items
    is resampled.
    """
    if not len(groups):
        return Estimate(value=value, low=value, high=value, count=count or 0)
    _, indices = np.unique(groups, return_inverse=True)
    number = int(indices.max()) + 1
    generator = np.random.default_rng(seed)
    values = np.array(
        [
            replicate(np.bincount(generator.integers(number, size=number), minlength=number)[indices].astype(float))
            for _ in range(replicates)
        ]
    )
    low, high = np.quantile(values - values.mean(), [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) * scale
    return Estimate(value=value, low=value + float(low), high=value + float(high), count=count or len(groups))


def bootstrap_mean(
    values: Sequence[float] | np.ndarray, groups: np.ndarray, *, replicates: int, seed: int = 0
) -> Estimate:
    """Return the mean of values (n,) with its interval under resampling of groups (n,).

    A share that is 0 or 1 has Wilson's interval for the number of groups.
    """
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        return Estimate(value=float("nan"), low=float("nan"), high=float("nan"), count=0)
    if array.min() == array.max() and array[0] in (0, 1):  # resampling a share of 0 or 1 shows no uncertainty
        number = len(np.unique(groups))
        share = stats.binomtest(int(array[0]) * number, number).proportion_ci(LEVEL, method="wilson")
        return Estimate(value=float(array[0]), low=float(share.low), high=float(share.high), count=len(array))
    return bootstrap(
        float(array.mean()),
        lambda weights: float(weights @ array / weights.sum()),
        groups,
        replicates=replicates,
        seed=seed,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class SignTest:
    """The sign test of paired scores: how often the second is higher and lower, and the two-sided p-value."""

    higher: int
    lower: int
    ties: int
    p_value: float


def sign_test(first: Sequence[float], second: Sequence[float]) -> SignTest:
    """Compare paired scores (n,); ties are left out, as usual for this test.

    Raises ValueError if the numbers of scores differ.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} scores cannot be paired with {len(second)}; evaluate both by the same prompts")
    differences = np.subtract(np.asarray(second, float), np.asarray(first, float))
    higher, lower = int((differences > 0).sum()), int((differences < 0).sum())
    p_value = stats.binomtest(higher, higher + lower).pvalue if higher + lower else 1.0
    return SignTest(higher=higher, lower=lower, ties=len(first) - higher - lower, p_value=float(p_value))
