"""Nodes that a run has met: the attempts on each, and those that it avoids from then on.

RUN/excluded_nodes.json holds the nodes that failed the preflight, with the reasons.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from jobs.state.run import UNFINISHED, Element, Run, last_error
from pixart import records
from pixart.atomic import write_atomically
from slurm.task import INTERRUPTED, attempts

FILE = "excluded_nodes.json"
MIN_FAILURES = 2  # from which a node is avoided, if other nodes succeed


def excluded(folder: Path) -> dict[str, str]:
    """Return the nodes that failed the preflight of a run, with the reasons."""
    return records.read(folder / FILE, dict[str, str]) if (folder / FILE).exists() else {}


def exclude(folder: Path, bad: Mapping[str, str]) -> dict[str, str]:
    """Add nodes to those that a run avoids, and return all of them."""
    nodes = {**excluded(folder), **bad}
    write_atomically(folder / FILE, json.dumps(nodes) + "\n")
    return nodes


def counts(folder: Path) -> Counter[str]:
    """Return the number of attempts on each node: a start of a job there, however many ranks it had."""
    return Counter(node for node, _, _ in {(line["node"], line["job"], line["restart"]) for line in attempts(folder)})


def suspects(run: Run, elements: Mapping[int, Element]) -> dict[str, str]:
    """Return the nodes to avoid when a run is submitted again, with the reasons.

    These are the nodes that failed the preflight; that of a task that ended as NODE_FAIL; one where several tasks
    failed, of one element or of several, and none succeeded, while tasks on other nodes did; and one that all failed
    jobs of ranks had in common.
    """
    nodes = excluded(run.folder)
    nodes_of: dict[str, set[str]] = {}
    last_of: dict[str, str] = {}
    for line in attempts(run.folder):
        nodes_of.setdefault(line["job"], set()).add(line["node"])
        last_of[line["job"]] = line["node"]
    failed = {item.job: item for item in elements.values() if item.state in UNFINISHED and item.job in nodes_of}
    for job, element in failed.items():
        if element.note.startswith("node_fail") and len(nodes_of[job]) == 1:
            nodes.setdefault(last_of[job], f"job {job} ended there as NODE_FAIL")
    if run.elements:
        newest = set(run.job_of().values())
        earlier = [job for job, _ in run.jobs if job in last_of and job not in newest and not was_interrupted(run, job)]
        now = [job for job, element in failed.items() if element.state == "failed"]
        failures = Counter(last_of[job] for job in [*earlier, *now])
        succeeded = {last_of[item.job] for item in elements.values() if item.state == "done" and item.job in last_of}
        for node, count in failures.items():
            if count >= MIN_FAILURES and succeeded and node not in succeeded:
                nodes.setdefault(node, f"{count} tasks failed there, and none succeeded")
    elif failed:
        jobs = [nodes_of[job] for job, _ in run.jobs if job in nodes_of]
        common = set.intersection(*jobs)
        if len(jobs) >= MIN_FAILURES and len(common) == 1 and len(set.union(*jobs)) > 1:
            nodes.setdefault(common.pop(), f"all {len(jobs)} failed jobs ran there")
    return nodes


def was_interrupted(run: Run, job: str) -> bool:
    """Return whether a task was ended by a signal, such as that of `cancel`, and has not failed."""
    return last_error(run, job).startswith(INTERRUPTED)


def joined(*lists: str | None) -> str | None:
    """Return the comma-separated node names of several lists as one, or None without any."""
    names = [name for text in lists if text for name in text.split(",")]
    return ",".join(dict.fromkeys(names)) or None
