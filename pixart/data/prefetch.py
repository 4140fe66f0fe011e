"""Work on items by threads, ahead of whoever takes the results in order."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")
# Pillow gives up the interpreter while it decodes and resizes; a processor is left to the taker of results.
THREADS = max(1, min(16, len(os.sched_getaffinity(0)) - 1))
AHEAD = 128  # results that may wait
NICENESS = 10  # of each thread, as Linux has it: they work when whoever takes the results, and its engine, leave time


def made_ahead(function: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
    """What `function` makes of the items, in their order; what it or the items raise is raised at its place.

    The items are asked for by a thread of their own: whoever takes the results does not wait while they are read.
    """
    source, end = iter(items), object()

    def make(asked: Future[Any]) -> Any:
        item = asked.result()
        return item if item is end else function(item)

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(THREADS, "ahead", os.nice, (NICENESS,)) as pool:
        pending = deque(pool.submit(make, reader.submit(next, source, end)) for _ in range(AHEAD))
        try:
            while (made := pending.popleft().result()) is not end:
                pending.append(pool.submit(make, reader.submit(next, source, end)))
                yield made
        finally:
            reader.shutdown(wait=False, cancel_futures=True)
            pool.shutdown(wait=False, cancel_futures=True)
