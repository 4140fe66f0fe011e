"""Timing of work on a GPU or a CPU."""

import statistics
import time
from collections.abc import Callable

import torch


def median_seconds(function: Callable[[], object], repeats: int) -> float:
    """Return the median time in seconds of `repeats` calls after one warm-up call.

    On a GPU each call is enclosed in two CUDA events, so that the host's kernel launches and synchronizations do not
    count as long as the host stays ahead of the device.
    """
    function()
    if torch.cuda.is_available():
        return statistics.median(cuda_event_seconds(function, repeats))
    return statistics.median(host_seconds(function) for _ in range(repeats))


def cuda_event_seconds(function: Callable[[], object], repeats: int) -> list[float]:
    """Return the time in seconds between the two CUDA events around each call."""
    torch.cuda.synchronize()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]  # elapsed_time is in milliseconds


def host_seconds(function: Callable[[], object]) -> float:
    """Return the wall-clock time in seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def synchronize() -> None:
    """Wait for all kernels on the current GPU; do nothing without a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
