"""Remarks on distances that rank nothing, from figures of small sets."""

from dataclasses import asdict

import numpy as np

from pixart.evaluation.figures import compute
from pixart.evaluation.page import figures_table
from pixart.evaluation.protocol import MIN_NEIGHBOR_IMAGES, remarks
from pixart.evaluation.statistics import FeatureStatistics

DIM = 4


def statistics(values: np.ndarray) -> FeatureStatistics:
    return FeatureStatistics.empty(DIM, len(values)).add(np.arange(len(values)), values)


def figures_of(count: int, shift: float) -> dict[str, dict]:
    random = np.random.default_rng(0)
    generated, reference = random.standard_normal((count, DIM)) + shift, random.standard_normal((count, DIM))
    computed = compute(
        statistics(generated), statistics(reference), ("kid", "prdc"), images_per_prompt=1, replicates=20
    )
    return {name: asdict(estimate) for name, estimate in computed.items()}


def test_sets_that_are_separate_have_no_neighbors():
    (remark,) = remarks(figures_of(32, shift=50.0))
    assert remark.startswith("precision, recall, density, coverage are 0: ")


def test_remarks_on_few_images():
    neighbors, kid = remarks(figures_of(32, shift=0.0))
    assert "are of 32 images" in neighbors
    assert kid.startswith("kid is not distinguished from 0 by 32 images")
    assert remarks(figures_of(MIN_NEIGHBOR_IMAGES, shift=1.0)) == []
    assert remarks({}) == []


def test_the_page_has_the_remarks():
    figures = figures_of(32, shift=50.0)
    variant = {"step": 1, "weights": "ema", "steps": 1, "guidance": 1.0, "protocol": {"hash": "a"}, "figures": figures}
    assert "rank nothing" in figures_table(["kid"], [variant, variant])
    assert figures_table(["kid"], [variant, variant]).count("rank nothing") == 1
