"""The time for reporting a training step is negligible."""

import statistics
import time

import pytest

from jobs.state.journal import Journal
from tests.jobs.state.test_journal import steps

pytestmark = pytest.mark.slow

MOST_SECONDS = 50e-6  # 1 % of a step of 5 ms


def test_journal_line_takes_less_than_a_hundredth_of_a_step(tmp_path):
    journal, values = Journal(tmp_path), {f"train/metric_{index}": index / 7 for index in range(8)}
    seconds = []
    for step in range(5000):
        begun = time.perf_counter()
        journal.metrics(step, values)
        seconds.append(time.perf_counter() - begun)
    assert statistics.median(seconds) < MOST_SECONDS
    assert steps(tmp_path) == list(range(5000))
