"""A campaign against one area: it makes tries, judges what came of each, and counts."""

import contextlib
import io
import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from types import FrameType
from typing import Any, TypeVar

from jobs import launch

HANG_SECONDS = 10
STOP_SECONDS = 30  # after which a try is interrupted
PROPERTY = "attack"  # of a test's report
Value = TypeVar("Value")


class TookTooLongError(BaseException):
    """A try was interrupted; no handler of errors catches it."""


@dataclass(kw_only=True)
class Figures:
    """What came of the tries of one area."""

    area: str
    tries: int = 0
    refused: int = 0
    tracebacks: int = 0
    hangs: int = 0
    wrong: int = 0  # altered data was used, code ran, or an output held what it must not hold
    seconds: float = 0.0


@dataclass(kw_only=True)
class Campaign:
    """The tries against an area, the same ones in every run."""

    area: str
    tries: int  # how many to make
    generator: random.Random = field(default_factory=lambda: random.Random(0))
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.figures = Figures(area=self.area)

    def attempt(self, name: str, function: Callable[[], Value]) -> Value | None:
        """Call a function that may raise ValueError; return its value, None for a refusal."""
        self.figures.tries += 1
        begun = time.monotonic()
        value = None
        try:
            with interrupted_after(STOP_SECONDS):
                value = function()
        except ValueError:
            self.figures.refused += 1
        except TookTooLongError:
            pass
        except BaseException:
            self.figures.tracebacks += 1
            self.failures.append(f"{name}: traceback\n{traceback.format_exc(limit=-4)}")
        seconds = time.monotonic() - begun
        self.figures.seconds += seconds
        if seconds > HANG_SECONDS:
            self.figures.hangs += 1
            self.failures.append(f"{name}: took {seconds:.0f} s")
        return value

    def command(self, name: str, words: Sequence[str]) -> tuple[int, str]:
        """Run a command of the launcher in this process; return its exit code and its output.

        It must end with 0, 1 or 2, print one line of an error, and print no control character.
        """
        output, errors = io.StringIO(), io.StringIO()

        def run() -> int:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                try:
                    return launch.main(list(words))
                except SystemExit as end:
                    return end.code if isinstance(end.code, int) else 1

        code = self.attempt(f"{name}: {' '.join(words)[:200]!r}", run)
        if code is None:
            return 1, ""
        text = output.getvalue() + errors.getvalue()
        self.figures.refused += code == 2
        if code not in (0, 1, 2):
            self.wrong(name, f"exit code {code}")
        lines = errors.getvalue().splitlines()
        if code == 2 and [line[:7] for line in lines if not line.startswith("warning: ")] != ["error: "]:
            self.wrong(name, f"not one line of an error: {errors.getvalue()[-300:]!r}")
        if any(not letter.isprintable() and letter not in "\n\t" for letter in text):
            self.wrong(name, f"control characters in the output: {text[-300:]!r}")
        return code, text

    def wrong(self, name: str, problem: str) -> None:
        """Count a try whose result is wrong."""
        self.figures.wrong += 1
        self.failures.append(f"{name}: {problem}")

    def finish(self, record_property: Callable[[str, Any], None]) -> None:
        """Report the figures, and fail the test if anything broke."""
        record_property(PROPERTY, asdict(self.figures))
        assert not self.failures, f"{len(self.failures)} of {self.figures.tries} tries:\n" + "\n".join(
            self.failures[:8]
        )


def campaign(area: str, *, short: int, long: int) -> Campaign:
    """Return a campaign of `short` tries, or of `long` ones in `make attack`."""
    return Campaign(area=area, tries=long if is_long() else short)


def is_long() -> bool:
    """Return whether this is the long campaign of `make attack`."""
    return os.environ.get("PIXART_ATTACK") == "long"


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Raise TookTooLongError in the block after some seconds."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise TookTooLongError

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
