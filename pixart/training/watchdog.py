"""Diagnostics of a run: a watchdog for hangs, and a profiler of its steps."""

import faulthandler
import time
from pathlib import Path

import torch

STDERR = 2  # the file descriptor, as sys.stderr may be replaced
PROFILED_STEPS = 3


class HangWatchdog:
    """Context that prints the stacks of all threads of this rank, repeatedly, if no step ends for `minutes`."""

    def __init__(self, minutes: float) -> None:
        self.seconds, self.armed_at = 60 * minutes, -float("inf")
        self.step_ended()

    def step_ended(self) -> None:
        """Restart the timeout; call after each step."""
        now = time.monotonic()
        if now - self.armed_at > self.seconds / 10:  # arming it starts a thread
            faulthandler.dump_traceback_later(self.seconds, repeat=True, file=STDERR)
            self.armed_at = now

    def __enter__(self) -> "HangWatchdog":
        return self

    def __exit__(self, *error: object) -> None:
        faulthandler.cancel_dump_traceback_later()


class StepProfiler:
    """Profiler of PROFILED_STEPS steps from `first` on, whose trace Perfetto and chrome://tracing read; 0: none."""

    def __init__(self, run: Path, first: int) -> None:
        self.first, self.file = first, run / "profiles" / f"step-{first:08d}.json.gz"
        self.profiler: torch.profiler.profile | None = None

    def step_begins(self, step: int) -> Path | None:
        """Start or stop profiling before `step`, which counts from 1; return the trace's file when it is written."""
        if self.first and step == self.first:
            self.profiler = torch.profiler.profile(profile_memory=True)
            self.profiler.start()
        elif self.profiler and step >= self.first + PROFILED_STEPS:
            profiler, self.profiler = self.profiler, None
            profiler.stop()
            self.file.parent.mkdir(exist_ok=True)
            profiler.export_chrome_trace(str(self.file))
            return self.file
        return None
