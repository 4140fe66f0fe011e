"""Jobs that have completed while a shared file system does not show their results yet.

How long ago that was is measured by the clock of this machine alone, from the moment when a launcher saw it first: the
clocks of a cluster may differ by minutes. RUN/completed.json holds these moments.
"""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from pixart import records
from pixart.atomic import write_atomically
from slurm.commands import JobState

FILE = "completed.json"
VISIBLE_SECONDS = 60  # after which a shared file system shows what a job on another node has written
MAX_CLOCK_DIFFERENCE_SECONDS = 3600  # between Slurm's controller and this machine


def recent(run: Path, states: Mapping[str, JobState]) -> set[str]:
    """Return the jobs that have completed recently: their results may become visible yet.

    A run of another user, whose folder cannot be written, gives its jobs a minute by Slurm's clock.
    """
    ends = {job: state.end for job, state in states.items() if state.state == "COMPLETED" and state.end}
    now = time.time()
    if not os.access(run, os.W_OK):
        return {job for job, end in ends.items() if abs(now - end) < VISIBLE_SECONDS}
    young = [job for job, end in ends.items() if now - end < MAX_CLOCK_DIFFERENCE_SECONDS]
    if not young:
        return set()
    seen = records.read(run / FILE, dict[str, records.Moment]) if (run / FILE).exists() else {}
    if new := {job: now for job in young if job not in seen}:
        seen |= new
        write_atomically(run / FILE, json.dumps(seen) + "\n")
    return {job for job in young if now - seen[job] < VISIBLE_SECONDS}
