"""Requested and used resources of runs on Slurm, and the values that are suggested."""

import dataclasses
import json

import pytest

from jobs import launch
from jobs.reports import efficiency, lineage
from jobs.state import ledger
from jobs.state.journal import Journal
from jobs.state.run import Element, Run
from slurm import profile as profiles
from slurm.task import RESULT
from slurm.usage import FILE, UNITS

GIB = UNITS["G"]


def make_run(home, *, kind: str = "caption", shards: int = 4, per_task: int = 1, seconds: float = 600.0) -> Run:
    """Return a run with its profile, whose shards each took `seconds`."""
    run = Run(
        folder=home / "runs" / f"1-{kind}-a",
        kind=kind,
        executor="slurm",
        dataset=str(home / "data"),
        total=shards,
        nodes=0 if shards else 1,
        elements=tuple(range(shards)),
        per_task=per_task,
        jobs=tuple(
            (f"7_{task}", tuple(range(task * per_task, (task + 1) * per_task))) for task in range(shards // per_task)
        )
        or (("7", ()),),
    )
    (run.folder / "logs").mkdir(parents=True)
    run.save()
    (run.folder / "command.txt").write_text("")
    profile = dataclasses.replace(
        profiles.load("dev"), minutes={kind: 240}, memory_gb=64, cpus_per_task=8, gpus_per_node=1
    )
    (run.folder / "profile.json").write_text(json.dumps(dataclasses.asdict(profile)))
    for shard in run.elements:
        entry = ledger.Entry(manifest="m", inputs="", rows=1, valid=1, checksum="c", seconds=seconds, versions={})
        ledger.path(run.dataset, kind, shard).parent.mkdir(parents=True, exist_ok=True)
        ledger.record(run.dataset, kind, shard, entry)
    return run


def record(run: Run, job: str, seconds: float, memory: float, processors: float) -> None:
    line = {"job": job, "restart": 0, "rank": 0, "node": "n1", "seconds": seconds}
    line |= {"memory_bytes": memory * GIB, "processor_seconds": processors * seconds}
    with (run.folder / FILE).open("a") as file:
        file.write(json.dumps(line) + "\n")


def by_resource(rows) -> dict[str, tuple[str, str, str]]:
    return {row.resource: (row.requested, row.used, row.suggested) for row in rows}


def test_suggestions_follow_the_records_of_the_tasks(tmp_path):
    run = make_run(tmp_path)
    for job, seconds, memory in (("7_0", 700.0, 9.0), ("7_1", 900.0, 8.0), ("7_2", 650.0, 10.0), ("7_3", 640.0, 7.0)):
        record(run, job, seconds, memory, processors=2.5)
    assert by_resource(efficiency.rows(run, {}, accounting=False)) == {
        "time": ("240 min", "15 min, median 11 min", "[minutes] caption = 25"),  # 1.5 times 15, in steps of 5
        "memory per node": ("64 GiB", "10.0 GiB", "[memory] caption = 13"),
        "processors per task": ("8", "2.5", "[cpus] caption = 3"),
    }


def test_the_time_limit_covers_a_task_of_the_longest_shards(tmp_path):
    """Past shards of a run whose tasks now process two each."""
    run = make_run(tmp_path, per_task=2, seconds=1200.0)
    for job in ("7_0", "7_1"):
        record(run, job, 1300.0, memory=30, processors=8)
    rows = by_resource(efficiency.rows(run, {}, accounting=False))
    assert rows["time"][2] == "[minutes] caption = 65"  # 1.5 times a minute and twice 20 minutes
    assert rows["memory per node"][2] == rows["processors per task"][2] == ""  # the requests are close


def test_short_tasks_should_share_shards(tmp_path):
    run = make_run(tmp_path, shards=64, seconds=20.0)
    for task in range(64):
        record(run, f"7_{task}", 30.0, memory=30, processors=8)
    rows = by_resource(efficiency.rows(run, {}, accounting=False))
    assert rows["shards per task"] == ("1", "20.0 s per shard, 30 s per task", "--per-task 30")


@pytest.mark.parametrize(
    ("note", "resource", "suggested"),
    [
        ("out_of_memory: no error message", "memory per node", "[memory] caption = 128"),
        ("timeout: no error message", "time", "[minutes] caption = 480"),
    ],
)
def test_tasks_that_reached_a_limit_need_more(tmp_path, note, resource, suggested):
    run = make_run(tmp_path)
    record(run, "7_0", 600.0, memory=9, processors=8)
    rows = efficiency.rows(run, {1: Element(state="failed", job="7_1", note=note)}, accounting=False)
    assert by_resource(rows)[resource][2] == suggested


def test_gpus_by_the_metrics_of_the_nodes(tmp_path):
    run = make_run(tmp_path, kind="train", shards=0)
    record(run, "7", 9000.0, memory=30, processors=8)
    journal = Journal(run.folder)
    for percent in (0.5, 0.1):
        names = {"gpu_utilization_percentage": percent, "gpu_memory_usage_megabytes": 2147.483648}
        journal.metrics(1, {f"system/node_0/{name}": value for name, value in names.items()})
    rows = by_resource(efficiency.rows(run, {}, accounting=False))
    assert rows["GPUs per node"] == ("1", "0 %, 2.0 GiB", "[gpus] train = 0")
    node = lineage.trace(tmp_path, str(run.folder))
    assert node.facts["resources used"].startswith("time 150 min of 240 min; memory per node 30.0 GiB of 64 GiB")
    assert node.facts["suggested"] == "[gpus] train = 0"


def test_status_of_an_ended_run_shows_the_figures_of_sacct(tmp_path, programs, capsys):
    """The tasks have recorded nothing, since they were killed, or ran before usage was recorded."""
    home = tmp_path / "home"
    run = make_run(home, kind="audit", shards=0)
    (run.folder / RESULT).write_text("{}")
    programs(squeue="true", sacct="echo '7|COMPLETED|300|1||40:00|||'; echo '7.0|COMPLETED|300|1|1|40:00|2G||'")
    assert launch.main(["status", "--home", str(home)]) == 0
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["time", "240", "min", "5.0", "min", "[minutes]", "audit", "=", "10"] in printed
    assert ["memory", "per", "node", "64", "GiB", "2.0", "GiB", "[memory]", "audit", "=", "3"] in printed
    assert ["processors", "per", "task", "8", "8.0"] in printed
    programs(sacct="echo 'sacct: error: Socket timed out' >&2; exit 1")  # the states are known without it
    assert launch.main(["status", "--home", str(home)]) == 0
    assert "requested" not in capsys.readouterr().out


def test_runs_of_this_machine_have_no_requests(tmp_path):
    run = make_run(tmp_path)
    record(run, "7_0", 600.0, memory=9, processors=8)
    assert efficiency.rows(dataclasses.replace(run, executor="local"), {}, accounting=False) == []
