"""Space for a recipe's dataset and checkpoints: what is free on the file system, and what the user's quota leaves."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from jobs.commands.doctor.finding import Finding, missing, ok, unknown
from jobs.submission import estimates
from pixart.config.dataset import is_url
from pixart.config.recipe import Recipe

TIMEOUT_SECONDS = 20
UNITS = {"": 1024, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4, "p": 1024**5}  # a number alone is in KiB
AMOUNT = re.compile(r"([0-9.]+)([kmgtp]?)\*?", re.IGNORECASE)


def check(recipe: Recipe, home: Path) -> Iterator[Finding]:
    """Yield whether the dataset and the checkpoints of both stages fit on the file system, and into the quota."""
    needed = 0.0 if is_url(recipe.data.path) else estimates.dataset_bytes(recipe) or 0.0
    needed += sum(estimates.kept_checkpoint_bytes(recipe, stage) for stage in (1, 2))
    text = f"{estimates.terabytes(needed)} needed for the recipe {recipe.name}"
    if estimates.dataset_bytes(recipe) is None:
        text += " without its dataset, whose number of images is not known yet"
    folder = existing(home)
    free = shutil.disk_usage(folder).free
    free_space = f"{estimates.terabytes(free)} free on the file system of {folder}, {text}"
    yield ok("space", free_space) if free >= needed else missing("space", f"{free_space}; name another --home")
    left = quota_left(folder)
    if left is None:
        yield unknown("quota", f"no quota command answers for {folder}; ask for your limit, {text}")
    elif left < needed:
        yield missing("quota", f"{estimates.terabytes(left)} left, {text}; free some, or name another --home")
    else:
        yield ok("quota", f"{estimates.terabytes(left)} left")


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def quota_left(folder: Path) -> float | None:
    """Return the bytes that this user's quota leaves, by `lfs quota` on Lustre, else by `quota`; None if unknown."""
    user = str(os.getuid())  # not every user has a name
    for words in (["lfs", "quota", "-q", "-u", user, str(folder)], ["quota", "--no-wrap", "--user", user]):
        try:
            done = subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_SECONDS)
        except (OSError, subprocess.TimeoutExpired):
            continue
        left = [amount for line in done.stdout.splitlines() if (amount := left_of(line)) is not None]
        if left:
            return min(left)
    return None


def left_of(line: str) -> float | None:
    """Return the bytes that one line of a quota listing leaves; None if it names no limit.

    A line is the file system, then the blocks used, the soft and the hard limit, in KiB or with a unit.
    """
    words = line.split()
    if len(words) < 4 or not words[0].startswith("/"):
        return None
    amounts = [AMOUNT.fullmatch(word) for word in words[1:4]]
    if any(match is None for match in amounts):
        return None
    used, soft, hard = (float(match[1]) * UNITS[match[2].lower()] for match in amounts if match)
    limit = min((value for value in (soft, hard) if value), default=0.0)
    return max(0.0, limit - used) if limit else None
