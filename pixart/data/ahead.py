"""Work on items by threads, ahead of whoever takes the results in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")
THREADS = 4  # Pillow gives up the interpreter while it decodes and resizes
AHEAD = 128  # results that may wait


def made_ahead(function: Callable[[Given], Made], items: Iterable[Given]) -> Iterator[Made]:
    """What `function` makes of the items, in their order; what it raises is raised at its place."""
    with ThreadPoolExecutor(THREADS) as pool:
        pending: deque[Future[Made]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
