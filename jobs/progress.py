"""Progress of a long job: a bar on a terminal, a plain line every few seconds in a log."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_SECONDS = 10.0  # shortest interval between two plain lines


class ProgressLine:
    """Context manager of a progress line: `with ProgressLine("caption", total) as line: line.update(done, "text")`."""

    def __init__(self, name: str, total: int) -> None:
        self.name, self.total = name, total
        self.begun = self.printed = time.monotonic()
        self.first: int | None = None  # number done at the first update; excluded from the rate
        self.bar: Progress | None = None
        if sys.stdout.isatty():
            self.bar = Progress(
                TextColumn("{task.description:<14}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(),
            )

    def __enter__(self) -> "ProgressLine":
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task(self.name, total=self.total, rate="", note="")
        else:
            print(f"{self.name}: begun", flush=True)
        return self

    def update(self, done: int, note: str = "") -> None:
        """Show that `done` of the total are finished; a plain line is printed at most every PLAIN_SECONDS."""
        if self.first is None:
            self.first = done
        if self.bar:
            self.bar.update(self.task, completed=done, rate=format_rate(self.rate(done)), note=note)
        elif time.monotonic() - self.printed >= PLAIN_SECONDS:
            self.printed = time.monotonic()
            print(self.plain(done, note), flush=True)

    def rate(self, done: int) -> float:
        """Return the items finished per second since the start."""
        return (done - (self.first or 0)) / (time.monotonic() - self.begun)

    def plain(self, done: int, note: str) -> str:
        """Return the plain line: the items finished, the rate and the remaining time."""
        rate = self.rate(done)
        if not rate:
            return f"{self.name}: {done} of {self.total} after {time.monotonic() - self.begun:.0f} s"
        left = (self.total - done) / rate
        return (
            f"{self.name}: {done} of {self.total}, {format_rate(rate)}, {left:.0f} s left{', ' if note else ''}{note}"
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar:
            self.bar.stop()
        elif kind is None:
            print(f"{self.name}: done in {time.monotonic() - self.begun:.0f} s", flush=True)


def format_rate(rate: float) -> str:
    """Format a rate in items per second; per minute if it is below 0.5 per second."""
    return f"{rate:.1f}/s" if rate >= 0.5 or not rate else f"{60 * rate:.1f}/min"


def format_duration(seconds: float) -> str:
    """Return a duration as hours and minutes, or as seconds below one minute."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{int(seconds) // 3600} h {int(seconds) // 60 % 60:02d} min"
