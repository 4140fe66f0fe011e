"""Progress in a log: lines with the amount done, the rate and the remaining time."""

import pytest

from jobs import progress
from jobs.progress import ProgressLine, format_rate


@pytest.fixture
def clock(monkeypatch):
    """Clock of the test: a list with the current time in seconds, which the test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_plain_lines_are_printed_at_intervals(clock, capsys):
    with ProgressLine("caption", 40) as line:
        line.update(8)  # work done earlier does not count towards the rate
        for seconds, done in ((105, 10), (110, 18), (115, 20), (120, 28)):
            clock[0] = seconds
            line.update(done, "note")
    assert capsys.readouterr().out.splitlines() == [
        "caption: begun",
        "caption: 18 of 40, 1.0/s, 22 s left, note",
        "caption: 28 of 40, 1.0/s, 12 s left, note",
        "caption: done in 20 s",
    ]


def test_line_without_progress_has_the_elapsed_time(clock, capsys):
    with ProgressLine("convert", 1) as line:
        line.update(0)
        clock[0] = 130.0
        line.update(0)
    assert "convert: 0 of 1 after 30 s\n" in capsys.readouterr().out


@pytest.mark.parametrize(("rate", "words"), [(8.25, "8.2/s"), (0.5, "0.5/s"), (0.1, "6.0/min"), (0.0, "0.0/s")])
def test_rate_format(rate, words):
    assert format_rate(rate) == words
