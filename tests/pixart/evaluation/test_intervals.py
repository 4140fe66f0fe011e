"""Intervals by the bootstrap over prompts, and the sign test."""

import numpy as np
import pytest

from pixart.evaluation.intervals import bootstrap_mean, sign_test


def test_interval_of_a_mean_has_the_width_of_the_theory():
    values = np.random.default_rng(0).standard_normal(400)
    estimate = bootstrap_mean(values, np.arange(400), replicates=2000)
    half = 1.96 * values.std(ddof=1) / 20
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.high - estimate.low == pytest.approx(2 * half, rel=0.08)
    assert estimate.count == 400


def test_images_of_one_prompt_count_together():
    """Four copies of each value add no information, so the interval stays as wide."""
    values = np.random.default_rng(0).standard_normal(100)
    single = bootstrap_mean(values, np.arange(100), replicates=1000)
    copies = bootstrap_mean(np.repeat(values, 4), np.repeat(np.arange(100), 4), replicates=1000)
    assert copies.high - copies.low == pytest.approx(single.high - single.low)


def test_sign_test_leaves_out_ties():
    result = sign_test([0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1])
    assert (result.higher, result.lower, result.ties) == (5, 0, 1)
    assert result.p_value == pytest.approx(2 / 2**5)
    assert sign_test([1, 2], [1, 2]).p_value == 1
    with pytest.raises(ValueError, match="1 scores cannot be paired with 2"):
        sign_test([1], [1, 2])
