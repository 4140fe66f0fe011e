"""Jobs that completed without a visible result, by clocks that differ."""

import json
import os
import time

import pytest

from jobs.state import completed
from jobs.state.completed import FILE, VISIBLE_SECONDS, recent
from slurm.commands import JobState


class Clock:
    def __init__(self) -> None:
        self.now = time.time()

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(completed, "time", clock)
    return clock


@pytest.mark.parametrize("offset", [-600, 0, 600], ids=["behind", "equal", "ahead"])
def test_the_clock_of_the_controller_does_not_change_the_minute(tmp_path, clock, offset):
    states = {"7": JobState(state="COMPLETED", end=clock.now + offset), "8": JobState(state="FAILED", end=clock.now)}
    assert recent(tmp_path, states) == {"7"}
    clock.now += VISIBLE_SECONDS - 1
    assert recent(tmp_path, states) == {"7"}  # by another process, too: the moment is in a file
    clock.now += 2
    assert recent(tmp_path, states) == set()
    assert list(json.loads((tmp_path / FILE).read_text())) == ["7"]


def test_a_job_of_last_week_has_no_minute(tmp_path, clock):
    week = JobState(state="COMPLETED", end=clock.now - 7 * 86_400)
    assert recent(tmp_path, {"7": week, "8": JobState(state="COMPLETED", end=None)}) == set()
    assert not (tmp_path / FILE).exists()


def test_nothing_is_written_to_the_run_of_another_user(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    states = {"7": JobState(state="COMPLETED", end=clock.now - 5), "8": JobState(state="COMPLETED", end=clock.now - 70)}
    assert recent(tmp_path, states) == {"7"}
    assert not (tmp_path / FILE).exists()
