"""Time that work takes on a device."""

import statistics
import time
from collections.abc import Callable

import torch


def seconds(function: Callable[[], object], repeats: int) -> float:
    """Median of `repeats` calls, each waited for, after one that warms up."""
    taken = []
    for repeat in range(repeats + 1):
        wait()
        begun = time.perf_counter()
        function()
        wait()
        if repeat:
            taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
