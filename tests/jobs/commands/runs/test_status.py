"""The state of runs: how often Slurm is queried, and runs whose data is elsewhere."""

import dataclasses
import itertools
import json
import re

import pytest

from jobs import launch
from jobs.commands.runs import status
from jobs.state import ledger
from jobs.state.run import Run
from jobs.state.run_metadata import PROFILE, describe
from jobs.submission import wait
from slurm import profile as profiles
from tests.jobs.state.test_run import ENTRY, make_run

MOST_PER_MINUTE = 2


class Clock:
    """A clock that only `sleep` moves; at its end, `sleep` raises KeyboardInterrupt like a user would."""

    def __init__(self, end: float) -> None:
        self.now, self.end = 0.0, end

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.now >= self.end:
            raise KeyboardInterrupt


@pytest.fixture
def pipeline(tmp_path) -> list[Run]:
    """Return the runs of one submission on Slurm, with the default interval between two queries."""
    home, parent = tmp_path / "home", tmp_path / "home/submissions/1"
    parent.mkdir(parents=True)
    describe(parent, {})
    members = []
    for number, kind in enumerate(("caption", "latents", "train")):
        folder = home / "runs" / f"{number}-{kind}-a"
        (folder / "logs").mkdir(parents=True)
        (folder / "command.txt").write_text("")
        elements = () if kind == "train" else (0, 1)
        jobs = tuple((f"{number + 1}_{shard}", (shard,)) for shard in elements) or ((str(number + 1), ()),)
        dataset = str(home / "data")
        shape = {"total": 2, "nodes": 0 if elements else 1, "elements": elements}
        run = Run(folder=folder, kind=kind, executor="slurm", dataset=dataset, jobs=jobs, **shape)
        run.save()
        default = profiles.Profile(name="site", executor="slurm")
        (folder / PROFILE).write_text(json.dumps(dataclasses.asdict(default)))
        describe(folder, {}, parent=parent)
        members.append(run)
    return members


@pytest.fixture
def calls(programs, tmp_path):
    """Callable that returns how often Slurm's commands were called; every job is pending."""
    count = tmp_path / "count"
    listing = "1_[0-1]|PENDING|N/A|Priority\n2_[0-1]|PENDING|N/A|Dependency\n3|PENDING|N/A|Dependency"
    programs(squeue=f"echo squeue >> {count}; echo '{listing}'", sacct=f"echo sacct >> {count}")

    def number() -> dict[str, int]:
        words = count.read_text().split()
        return {word: words.count(word) for word in ("squeue", "sacct")}

    return number


def test_watching_a_pipeline_queries_slurm_twice_a_minute(pipeline, calls, monkeypatch, capsys):
    clock = Clock(600)
    monkeypatch.setattr(status, "time", clock)
    words = ["status", "train", "--watch", "--home", str(pipeline[0].folder.parents[1])]
    assert launch.main(words) == 130
    assert calls() == {"squeue": 600 // 60 * MOST_PER_MINUTE, "sacct": 0}
    printed = capsys.readouterr().out
    assert printed.count("all jobs of the submission, in order:") == calls()["squeue"]
    assert "2 pending" in printed


def test_a_launcher_that_waits_queries_slurm_twice_a_minute(pipeline, calls, monkeypatch):
    clock = Clock(600)
    monkeypatch.setattr(wait, "time", clock)
    profile = profiles.Profile(name="site", executor="slurm")
    with pytest.raises(KeyboardInterrupt):
        list(wait.poll(pipeline[0], profile.poll_seconds))
    assert calls() == {"squeue": 600 // 60 * MOST_PER_MINUTE, "sacct": 0}


def test_the_list_of_runs_queries_slurm_once(pipeline, calls, capsys):
    assert launch.main(["runs", "--home", str(pipeline[0].folder.parents[1])]) == 0
    assert capsys.readouterr().out.count("2 pending") == 2
    assert calls() == {"squeue": 1, "sacct": 0}


@pytest.mark.parametrize("shards", [0, 2])
def test_adopted_shards_have_a_rate(tmp_path, shards, capsys):
    """The ledger has their entries under the names of the jobs that they replace."""
    run = dataclasses.replace(make_run(tmp_path, jobs=[("1", (0, 1))], shards=2), kind="adopt")
    run.save()
    for job, shard in itertools.product(("caption", "latents"), range(shards)):
        ledger.path(run.dataset, job, shard).parent.mkdir(parents=True, exist_ok=True)
        ledger.record(run.dataset, job, shard, ENTRY)
    launch.main(["status", "--home", str(tmp_path)])
    assert ("shards/min" in capsys.readouterr().out) == bool(shards)


def test_a_dataset_at_a_url_has_no_rate(tmp_path, capsys):
    pytest.importorskip("fsspec")
    url = f"file://{tmp_path}/data"
    run = dataclasses.replace(make_run(tmp_path, jobs=[("1", (0, 1))], shards=2), dataset=url)
    run.save()
    for shard in run.elements:
        ledger.path(tmp_path / "data", "caption", shard).parent.mkdir(parents=True, exist_ok=True)
        ledger.record(tmp_path / "data", "caption", shard, ENTRY)
    assert launch.main(["status", "--home", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^done +2 *$", printed, re.MULTILINE)
    assert "shards/min" not in printed
