import os
import threading
import time

import pytest

from pixart.data import prefetch
from pixart.data.prefetch import NICENESS, prefetch_map


def test_results_are_in_order():
    def slow(value: int) -> int:
        time.sleep(0.01 * (value % 3))
        return value * value

    assert list(prefetch_map(slow, range(12))) == [value * value for value in range(12)]


def test_number_of_pending_inputs_is_limited(monkeypatch):
    monkeypatch.setattr(prefetch, "MAX_PENDING", 5)
    read = []

    def values():
        for value in range(20):
            read.append(value)
            yield value

    results = prefetch_map(str, values())
    assert next(results) == "0"
    time.sleep(0.1)
    assert len(read) == 6
    assert list(results) == [str(value) for value in range(1, 20)]


def test_threads_run_concurrently(monkeypatch):
    monkeypatch.setattr(prefetch, "NUM_THREADS", 3)
    barrier = threading.Barrier(3, timeout=10)
    assert list(prefetch_map(lambda value: barrier.wait() >= 0, range(6))) == [True] * 6


def test_exception_of_the_function_is_raised_at_its_position():
    results = prefetch_map(lambda value: 6 // value, [3, 2, 0, 1])
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_exception_of_the_inputs_is_raised_at_its_position():
    def values():
        yield 1
        raise OSError("gone")

    results = prefetch_map(str, values())
    assert next(results) == "1"
    with pytest.raises(OSError, match="gone"):
        next(results)


def test_closing_cancels_pending_work():
    completed = []
    results = prefetch_map(lambda value: time.sleep(0.02) or completed.append(value), range(1000))
    next(results)
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 0.5
    assert len(completed) < 20


def test_threads_have_lower_priority_than_the_consumer():
    before = os.getpriority(os.PRIO_PROCESS, 0)
    priorities = list(prefetch_map(lambda _: os.getpriority(os.PRIO_PROCESS, 0), range(3)))
    assert priorities == [min(19, before + NICENESS)] * 3
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
