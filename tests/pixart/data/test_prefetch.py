import os
import threading
import time

import pytest

from pixart.data import prefetch
from pixart.data.prefetch import NICENESS, made_ahead


def test_results_come_in_order_whatever_takes_longer():
    def slow(value: int) -> int:
        time.sleep(0.01 * (value % 3))
        return value * value

    assert list(made_ahead(slow, range(12))) == [value * value for value in range(12)]


def test_no_more_is_read_than_may_wait(monkeypatch):
    monkeypatch.setattr(prefetch, "AHEAD", 5)
    read = []

    def values():
        for value in range(20):
            read.append(value)
            yield value

    results = made_ahead(str, values())
    assert next(results) == "0"
    time.sleep(0.1)
    assert len(read) == 6
    assert list(results) == [str(value) for value in range(1, 20)]


def test_threads_work_at_the_same_time(monkeypatch):
    monkeypatch.setattr(prefetch, "THREADS", 3)
    together = threading.Barrier(3, timeout=10)
    assert list(made_ahead(lambda value: together.wait() >= 0, range(6))) == [True] * 6


def test_an_error_is_raised_at_its_place():
    results = made_ahead(lambda value: 6 // value, [3, 2, 0, 1])
    assert [next(results), next(results)] == [2, 3]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_an_error_of_the_source_is_raised_at_its_place():
    def values():
        yield 1
        raise OSError("gone")

    results = made_ahead(str, values())
    assert next(results) == "1"
    with pytest.raises(OSError, match="gone"):
        next(results)


def test_what_is_left_early_is_not_worked_on():
    done = []
    results = made_ahead(lambda value: time.sleep(0.02) or done.append(value), range(1000))
    next(results)
    begun = time.monotonic()
    results.close()
    assert time.monotonic() - begun < 0.5
    assert len(done) < 20


def test_threads_give_way_to_whoever_takes_the_results():
    before = os.getpriority(os.PRIO_PROCESS, 0)
    found = list(made_ahead(lambda _: os.getpriority(os.PRIO_PROCESS, 0), range(3)))
    assert found == [min(19, before + NICENESS)] * 3
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
