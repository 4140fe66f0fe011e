"""Efficiency of a run on Slurm: the resources that its jobs requested, those that they used, and values to request."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean, median

from jobs.state import ledger
from jobs.state import run as runs
from jobs.state.journal import read_tail
from jobs.state.run import Element, Run
from jobs.state.run_metadata import read_profile
from slurm import usage
from slurm.commands import SlurmError
from slurm.profile import Profile, for_kind
from slurm.usage import Usage

GIB, MEGABYTE = 2**30, 1e6  # Slurm's GB is 2**30 bytes; megabytes are the unit of the node agent's metrics
TIME_FACTOR, MINUTES_STEP = 1.5, 5  # suggested time limit: the longest duration times the factor, rounded up
MEMORY_FACTOR = 1.25
MAX_FACTOR = 2.0  # of a suggested value: a request up to that is not worth a change
START_SECONDS = 60  # of a task, before its first shard
SHORT_SECONDS, TASK_SECONDS = 120, 600  # tasks shorter than the first should share shards until they take the second
MAX_SHARDS = 1000  # whose entries are read
IDLE_PERCENT = 1.0  # mean GPU utilization of a job that does not use its GPU


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One resource: what was requested and used, and what to request; "" if that is as it should be."""

    resource: str
    requested: str
    used: str
    suggested: str = ""


def rows(run: Run, elements: Mapping[int, Element], *, accounting: bool) -> list[Row]:
    """Return a row for each resource that was measured; none for processes of this machine.

    With `accounting`, sacct is queried for what the tasks have not recorded. `elements` are the states of the run.
    """
    if run.executor != "slurm":
        return []
    usages = measured(run, accounting=accounting)
    if not usages:
        return []
    profile = for_kind(read_profile(run.folder), run.kind)
    notes = [element.note for element in elements.values() if element.state == "failed"]
    shards = shard_seconds(run)
    measurements = [
        time_row(run, profile, usages, shards, notes),
        shards_row(run, usages, shards),
        memory_row(run, profile, usages, notes),
        processors_row(run, profile, usages),
        gpu_row(run, profile, usages),
    ]
    return [row for row in measurements if row]


def measured(run: Run, *, accounting: bool) -> list[Usage]:
    """Return the resources of each task, as recorded by the tasks and, if `accounting`, by sacct."""
    recorded = usage.recorded(run.folder)
    jobs = [job for job, _ in run.jobs]
    try:
        accounted = usage.accounted(jobs) if accounting and jobs else {}
    except SlurmError:  # the states of the jobs are known, and their resources are not worth an error
        accounted = {}
    return [merged(recorded.get(job), accounted.get(job)) for job in jobs if job in recorded or job in accounted]


def merged(recorded: Usage | None, accounted: Usage | None) -> Usage:
    """Return the larger figure of each resource; only sacct knows of GPUs, and of tasks that were killed."""
    known = [item for item in (recorded, accounted) if item]
    processors = [item.processors for item in known if item.processors is not None]
    memory = [item.memory_bytes for item in known if item.memory_bytes is not None]
    return Usage(
        seconds=max(item.seconds for item in known),
        processors=processors[0] if processors else None,
        memory_bytes=max(memory, default=None),
        gpu_percent=accounted.gpu_percent if accounted else None,
        gpu_memory_bytes=accounted.gpu_memory_bytes if accounted else None,
    )


def time_row(run: Run, profile: Profile, usages: list[Usage], shards: list[float], notes: list[str]) -> Row:
    """Return the row of the time limit; the suggestion covers a task of the longest shards."""
    requested = profile.minutes.get(run.kind)
    longest = max(item.seconds for item in usages)
    if shards:
        longest = max(longest, START_SECONDS + run.per_task * max(shards))
    value = MINUTES_STEP * math.ceil(TIME_FACTOR * longest / 60 / MINUTES_STEP)
    if requested and any(note.startswith("timeout") for note in notes):
        value = max(value, 2 * requested)
    typical = f", median {minutes(median(item.seconds for item in usages))}" if len(usages) > 1 else ""
    return Row(
        resource="time",
        requested=f"{requested} min" if requested else "no limit",
        used=minutes(max(item.seconds for item in usages)) + typical,
        suggested=suggestion("minutes", run.kind, requested, value),
    )


def shards_row(run: Run, usages: list[Usage], shards: list[float]) -> Row | None:
    """Return the row of the shards per task, if the tasks of an array are too short for the time of their start."""
    typical = median(item.seconds for item in usages)
    if len(usages) < 2 or not shards or typical > SHORT_SECONDS:
        return None
    count = min(len(run.elements), max(1, round(TASK_SECONDS / max(0.1, median(shards)))))
    if count < MAX_FACTOR * run.per_task:
        return None
    return Row(
        resource="shards per task",
        requested=str(run.per_task),
        used=f"{median(shards):.1f} s per shard, {typical:.0f} s per task",
        suggested=f"--per-task {count}",
    )


def memory_row(run: Run, profile: Profile, usages: list[Usage], notes: list[str]) -> Row | None:
    """Return the row of the memory per node, of the processes of this run."""
    known = [item.memory_bytes for item in usages if item.memory_bytes is not None]
    if not known:
        return None
    requested = profile.memory_gb
    value = math.ceil(MEMORY_FACTOR * max(known) / GIB)
    if requested and any(note.startswith("out_of_memory") for note in notes):
        value = max(value, 2 * requested)
    return Row(
        resource="memory per node",
        requested=f"{requested} GiB" if requested else "partition's default",
        used=f"{max(known) / GIB:.1f} GiB",
        suggested=suggestion("memory", run.kind, requested, value),
    )


def processors_row(run: Run, profile: Profile, usages: list[Usage]) -> Row | None:
    """Return the row of the processors per task."""
    known = [item.processors for item in usages if item.processors is not None]
    if not known:
        return None
    return Row(
        resource="processors per task",
        requested=str(profile.cpus_per_task),
        used=f"{fmean(known):.1f}",
        suggested=suggestion("cpus", run.kind, profile.cpus_per_task, max(1, math.ceil(max(known)))),
    )


def gpu_row(run: Run, profile: Profile, usages: list[Usage]) -> Row | None:
    """Return the row of the GPUs per node, by sacct or by the metrics of the node agents."""
    requested = profile.gpus_per_node if not run.elements else min(1, profile.gpus_per_node)
    percents = [item.gpu_percent for item in usages if item.gpu_percent is not None]
    memory = [item.gpu_memory_bytes for item in usages if item.gpu_memory_bytes is not None]
    if not percents:
        metrics = [line["metrics"] for line in read_tail(run.folder) if "metrics" in line]
        percents = values_of(metrics, "gpu_utilization_percentage")
        memory = [MEGABYTE * value for value in values_of(metrics, "gpu_memory_usage_megabytes")]
    if not percents or not requested:
        return None
    mean = fmean(percents)
    return Row(
        resource="GPUs per node",
        requested=str(requested),
        used=f"{mean:.0f} %" + (f", {max(memory) / GIB:.1f} GiB" if memory else ""),
        suggested=f"[gpus] {run.kind} = 0" if mean < IDLE_PERCENT else "",
    )


def values_of(metrics: list[dict[str, float]], name: str) -> list[float]:
    """Return the values of a system metric on all nodes."""
    return [
        value
        for item in metrics
        for key, value in item.items()
        if key.startswith("system/node_") and key.endswith(f"/{name}")
    ]


def shard_seconds(run: Run) -> list[float]:
    """Return the durations of finished shards of an array, from the ledger, of at most MAX_SHARDS shards."""
    if not run.elements:
        return []
    shards = sorted(runs.done(run) & set(run.elements))
    shards = shards[:: max(1, math.ceil(len(shards) / MAX_SHARDS))]
    return [entry.seconds for entry in ledger.entries(run.dataset, ledger.entries_of(run.kind), shards).values()]


def suggestion(table: str, kind: str, requested: int | None, value: int) -> str:
    """Return the line of a cluster profile that requests a value; "" if the present request is close to it."""
    close = requested is not None and value <= requested <= MAX_FACTOR * value
    return "" if close else f"[{table}] {kind} = {value}"


def minutes(seconds: float) -> str:
    """Return a duration in minutes, with a decimal below ten."""
    return f"{seconds / 60:.1f} min" if seconds < 600 else f"{seconds / 60:.0f} min"


def facts(run: Run) -> dict[str, str]:
    """Return what the tasks of a run have recorded, as facts for its pages."""
    measurements = rows(run, {}, accounting=False)
    suggested = [row.suggested for row in measurements if row.suggested]
    used = {"resources used": "; ".join(f"{row.resource} {row.used} of {row.requested}" for row in measurements)}
    advice = {"suggested": ", ".join(suggested)}
    return {key: value for key, value in {**used, **advice}.items() if value}
