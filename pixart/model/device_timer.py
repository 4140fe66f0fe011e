"""Time that work takes on a device."""

import statistics
import time
from collections.abc import Callable

import torch


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Return the median time of `repeats` calls after one that warms up.

    On a GPU each call lies between two events of the device, so that the host's launches and its waiting do not count
    as long as they keep ahead.
    """
    function()
    if torch.cuda.is_available():
        return statistics.median(device_seconds(function, repeats))
    return statistics.median(host_seconds(function) for _ in range(repeats))


def device_seconds(function: Callable[[], object], repeats: int) -> list[float]:
    """Return the time of each call between two CUDA events."""
    torch.cuda.synchronize()
    spans = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in spans:
        begin.record()
        function()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in spans]  # milliseconds


def host_seconds(function: Callable[[], object]) -> float:
    """Return the time of one call on the host's clock."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
