"""Ordered parallel map in background threads, ahead of the consumer."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Input = TypeVar("Input")
Output = TypeVar("Output")
# Pillow releases the GIL while it decodes and resizes; one core is left to the consumer.
NUM_THREADS = max(1, min(16, len(os.sched_getaffinity(0)) - 1))
MAX_PENDING = 128  # inputs that are being processed, and results that are waiting for the consumer
NICENESS = 10  # of each thread, as Linux counts it, so that the consumer and its engine take precedence


def prefetch_map(function: Callable[[Input], Output], inputs: Iterable[Input]) -> Iterator[Output]:
    """Yield `function(input)` for every input, in order, computed by background threads.

    The inputs are read by a separate thread, so the consumer does not wait for them. An exception from the function
    or from the inputs is raised at its position.
    """
    iterator, end = iter(inputs), object()

    def compute(reading: Future[Any]) -> Any:
        value = reading.result()
        return value if value is end else function(value)

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(NUM_THREADS, "prefetch", os.nice, (NICENESS,)) as pool:
        pending = deque(pool.submit(compute, reader.submit(next, iterator, end)) for _ in range(MAX_PENDING))
        try:
            while (result := pending.popleft().result()) is not end:
                pending.append(pool.submit(compute, reader.submit(next, iterator, end)))
                yield result
        finally:
            reader.shutdown(wait=False, cancel_futures=True)
            pool.shutdown(wait=False, cancel_futures=True)
