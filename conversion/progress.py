"""Progress of a conversion: a bar on a terminal, one line per step in a log.

The line of a step names it as it begins. That of the first step, in which invalid input is found, is printed when it
has ended, so that an error is one line.
"""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar


class Progress:
    """Context manager that reports each step on standard error, with its duration in seconds."""

    def __init__(self, steps: int, *, enabled: bool = True) -> None:
        self.name, self.started, self.enabled = "", 0.0, enabled
        self.steps_done = 0
        self.bar = None
        if enabled and sys.stderr.isatty():
            columns = (MofNCompleteColumn(), BarColumn(20), TimeElapsedColumn(), TextColumn("{task.description}"))
            self.bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task("", total=steps)

    def begin(self, name: str) -> None:
        """End the current step and begin the one called `name`."""
        self.end()
        self.name, self.started = name, time.perf_counter()
        if self.bar:
            self.bar.update(self.task, description=name)
        elif self.enabled and self.steps_done:
            print(name, end=": ", file=sys.stderr, flush=True)

    def end(self) -> None:
        """End the current step, and print its duration if there is no bar."""
        if self.name:
            if self.bar:
                self.bar.advance(self.task)
            elif self.enabled:
                name = "" if self.steps_done else f"{self.name}: "
                print(f"{name}{time.perf_counter() - self.started:.1f} s", file=sys.stderr, flush=True)
            self.steps_done += 1
        self.name = ""

    def __enter__(self) -> "Progress":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.end()
        elif self.name and self.enabled and self.steps_done and not self.bar:
            print("failed", file=sys.stderr, flush=True)
        if self.bar:
            self.bar.stop()
