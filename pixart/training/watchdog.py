"""Looking into a run: where it hangs, and what its steps are made of."""

import faulthandler
import time
from pathlib import Path

import torch

STDERR = 2  # whatever else has taken the place of sys.stderr
PROFILED = 3  # steps of a trace


class Watch:
    """Where no step ends for some time, the stacks of all threads of every rank are printed, again and again."""

    def __init__(self, minutes: float) -> None:
        self.seconds, self.set_at = 60 * minutes, -float("inf")
        self.step_ended()

    def step_ended(self) -> None:
        now = time.monotonic()
        if now - self.set_at > self.seconds / 10:  # setting it starts a thread
            faulthandler.dump_traceback_later(self.seconds, repeat=True, file=STDERR)
            self.set_at = now

    def __enter__(self) -> "Watch":
        return self

    def __exit__(self, *error: object) -> None:
        faulthandler.cancel_dump_traceback_later()


class Profile:
    """A trace of a few steps from step `first` on, for Perfetto or chrome://tracing; of none where it is 0."""

    def __init__(self, run: Path, first: int) -> None:
        self.first, self.file = first, run / "profiles" / f"step-{first:08d}.json.gz"
        self.profiler: torch.profiler.profile | None = None

    def step_begins(self, step: int) -> Path | None:
        """To be called before each step, by its number from 1; returns the file once it is written."""
        if self.first and step == self.first:
            self.profiler = torch.profiler.profile(profile_memory=True)
            self.profiler.start()
        elif self.profiler and step >= self.first + PROFILED:
            profiler, self.profiler = self.profiler, None
            profiler.stop()
            self.file.parent.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(self.file))
            return self.file
        return None
