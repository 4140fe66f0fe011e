"""Limits of the cluster, by sinfo and scontrol: those of partitions, and the largest array."""

import re
from dataclasses import dataclass

from slurm.commands import SlurmError, command


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """Limits of a Slurm partition."""

    minutes: int | None  # time limit of a job; None: no limit
    nodes: int
    gpus_per_node: int  # maximum over the nodes


def partition(name: str | None) -> Partition:
    """Return the limits of a partition, or of the default partition if `name` is None.

    Of a list such as `main,urgent`, of which Slurm takes the one that starts the job first, these are the most generous
    limits. Raises SlurmError if one does not exist.
    """
    listing = command("sinfo", "--noheader", "--all", "--Node", "--format=%P|%l|%N|%G")  # with hidden partitions
    rows = [line.split("|", 3) for line in listing.splitlines()]
    names = sorted({row[0].rstrip("*") for row in rows})
    wanted = name.split(",") if name else []
    if unknown := [item for item in wanted if item not in names]:
        raise SlurmError(
            f"partition {unknown[0]!r}: no such partition on this cluster; it must be one of {', '.join(names)}"
        )
    matching = [row for row in rows if (row[0].rstrip("*") in wanted if wanted else row[0].endswith("*"))]
    if not matching:
        raise SlurmError("partition: the cluster has no default partition; set `partition` in the profile")
    gpus = [sum(int(count) for count in re.findall(r"gpu(?::[^:,(]+)?:([0-9]+)", row[3])) for row in matching]
    minutes = [parse_minutes(row[1]) for row in matching]
    return Partition(
        minutes=None if None in minutes else max(limit for limit in minutes if limit is not None),
        nodes=max(len({row[2] for row in matching if row[0] == title}) for title in {row[0] for row in matching}),
        gpus_per_node=max(gpus),
    )


def parse_minutes(text: str) -> int | None:
    """Return the whole minutes of a time limit in Slurm's notation; None for `infinite`.

    The forms are `days-hours:minutes:seconds`, `hours:minutes:seconds` and `minutes:seconds`.
    """
    if text == "infinite":
        return None
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    hours, minutes = (parts[0], parts[1]) if len(parts) == 3 else (0, parts[0])
    return int(days or 0) * 24 * 60 + hours * 60 + minutes


def max_array_size() -> int:
    """Return Slurm's MaxArraySize, which limits the elements of one array. Raises SlurmError if scontrol fails."""
    match = re.search(r"^MaxArraySize\s*=\s*([0-9]+)", command("scontrol", "show", "config"), re.MULTILINE)
    return int(match[1]) if match else 1001
