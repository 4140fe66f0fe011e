"""Parsing of `--array`: the shards to process and the limit of concurrent tasks, in Slurm's notation."""

import re

from pixart.config.dataset import MAX_SHARDS

RANGE = re.compile(r"([0-9]+)(?:-([0-9]+)(?::([0-9]+))?)?")
NOTATION = "write shards as 0-255, 3,7,9-12, 0-999:10 or 0-255%32"


def parse_array(text: str | None) -> tuple[list[int] | None, int | None]:
    """Return the shards of `text` in ascending order, and the limit after `%`; None for each that is not given.

    Raises ValueError for anything but Slurm's notation: `0-255`, `3,7,9-12`, `0-999:10`, `0-255%32`.
    """
    if text is None:
        return None, None
    ranges, _, limit = text.partition("%")
    if "%" in text and not (limit.isascii() and limit.isdecimal() and int(limit) > 0):
        raise ValueError(f"--array {text!r}: the limit after % must be a positive integer")
    shards: set[int] = set()
    for part in ranges.split(","):
        match = RANGE.fullmatch(part)
        if match is None:
            raise ValueError(f"--array {text!r}: {part!r} is not a shard or a range; {NOTATION}")
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if last < first or step < 1:
            raise ValueError(f"--array {text!r}: the range {part!r} is empty; {NOTATION}")
        if last >= MAX_SHARDS:
            raise ValueError(f"--array {text!r}: a dataset has at most {MAX_SHARDS} shards")
        shards.update(range(first, last + 1, step))
    return sorted(shards), int(limit) if limit else None
