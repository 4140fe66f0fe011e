"""`--array`: which shards, and how many at once, in Slurm's notation."""

import re

from pixart.config.dataset import MAX_SHARDS

PART = re.compile(r"([0-9]+)(?:-([0-9]+)(?::([0-9]+))?)?")


def parse_array(text: str) -> tuple[list[int], int | None]:
    """`0-255`, `0-255%32`, `3,7,9-12` or `0-999:10` -> shards in ascending order, and the limit after `%` or None.

    Raises ValueError for anything else, with what is wrong.
    """
    wanted = "write shards as 0-255, 3,7,9-12, 0-999:10 or 0-255%32"
    shards, _, limit = text.partition("%")
    if "%" in text and not (limit.isascii() and limit.isdecimal() and int(limit) > 0):
        raise ValueError(f"--array {text!r}: the limit after % must be a positive number")
    found: set[int] = set()
    for part in shards.split(","):
        match = PART.fullmatch(part)
        if match is None:
            raise ValueError(f"--array {text!r}: {part!r} is no shard or range, {wanted}")
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if last < first or step < 1:
            raise ValueError(f"--array {text!r}: the range {part!r} is empty, {wanted}")
        if last >= MAX_SHARDS:
            raise ValueError(f"--array {text!r}: a dataset has at most {MAX_SHARDS} shards")
        found.update(range(first, last + 1, step))
    return sorted(found), int(limit) if limit else None
