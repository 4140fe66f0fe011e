"""Nodes that a run avoids when it is submitted again."""

import json
from dataclasses import replace

from jobs.state import nodes
from jobs.state.run import Element
from slurm.task import ATTEMPTS
from tests.jobs.state.test_run import make_run


def attempt(run, job: str, node: str, rank: int = 0, restart: int = 0) -> None:
    line = {"job": job, "rank": rank, "restart": restart, "node": node, "arguments": [], "time": "2026-11-27T08:00:00"}
    with (run.folder / ATTEMPTS).open("a") as file:
        file.write(json.dumps(line) + "\n")


def test_nodes_of_the_preflight_are_kept(tmp_path):
    run = make_run(tmp_path)
    assert nodes.excluded(run.folder) == {}
    nodes.exclude(run.folder, {"n1": "slow"})
    assert nodes.exclude(run.folder, {"n2": "broken"}) == {"n1": "slow", "n2": "broken"}
    assert nodes.joined("n9,n1", ",".join(nodes.excluded(run.folder))) == "n9,n1,n2"
    assert nodes.joined(None, "") is None


def test_a_node_on_which_tasks_fail_again_and_again(tmp_path):
    """Two failures on n2 while n1 succeeds make n2 suspicious; failures everywhere say nothing about nodes."""
    run = make_run(tmp_path, jobs=[(f"5_{index}", (index,)) for index in range(4)])
    for index, node in enumerate(("n1", "n2", "n2", "n3")):
        attempt(run, f"5_{index}", node)
    failed = {index: Element(state="failed", job=f"5_{index}", note="OSError") for index in range(4)}
    assert nodes.suspects(run, failed) == {}
    elements = {**failed, 0: Element(state="done", job="5_0")}
    assert nodes.suspects(run, elements) == {"n2": "2 tasks failed there, and none succeeded"}
    elements[3] = Element(state="failed", job="5_3", note="node_fail: no error message")
    assert nodes.suspects(run, elements)["n3"] == "job 5_3 ended there as NODE_FAIL"
    assert nodes.counts(run.folder) == {"n1": 1, "n2": 2, "n3": 1}


def test_the_node_that_failed_jobs_of_ranks_have_in_common(tmp_path):
    run = replace(make_run(tmp_path, jobs=[("7", ()), ("8", ())]), elements=(), nodes=2)
    for job, names in (("7", ("n1", "n2")), ("8", ("n2", "n3"))):
        for rank, node in enumerate(names):
            attempt(run, job, node, rank)
    failed = {0: Element(state="failed", job="8", note="RuntimeError")}
    assert nodes.suspects(run, failed) == {"n2": "all 2 failed jobs ran there"}
    assert nodes.suspects(replace(run, jobs=(("8", ()),)), failed) == {}


def test_a_node_on_which_one_element_fails_again_and_again(tmp_path):
    """Its earlier tasks count, but not those that were cancelled."""
    run = make_run(tmp_path, jobs=[("5_0", (0,)), ("5_1", (1,)), ("6", (1,)), ("7", (1,))], shards=2)
    for job, node in (("5_0", "n1"), ("5_1", "n2"), ("6", "n2"), ("7", "n2")):
        attempt(run, job, node)
    elements = {0: Element(state="done", job="5_0"), 1: Element(state="failed", job="7", note="OSError")}
    assert nodes.suspects(run, elements) == {"n2": "3 tasks failed there, and none succeeded"}
    for job in ("5_1", "6"):
        run.log(job).write_text("interrupted: the job is being terminated\nslurmstepd: error: cancelled\n")
    assert nodes.suspects(run, elements) == {}
