"""The list of runs: order, states, durations, and its time for many runs."""

import json
import os
import time

import pytest

from jobs import launch
from jobs.commands.runs.runs import format_duration
from jobs.state.run import Run
from jobs.state.run_metadata import describe, set_status


@pytest.fixture
def home(tmp_path):
    """Home folder with a finished training run, a failed one and an array whose processes have ended."""
    for number, (kind, status) in enumerate([("train", "FINISHED"), ("train", "FAILED"), ("caption", "RUNNING")]):
        folder = tmp_path / "runs" / f"20260101-00000{number}-{kind}-abcd"
        (folder / "logs").mkdir(parents=True)
        elements = (0, 1) if kind == "caption" else ()
        dataset = str(tmp_path / "datasets/demo")
        Run(
            folder=folder,
            kind=kind,
            executor="local",
            dataset=dataset,
            total=2,
            nodes=0 if elements else 1,
            elements=elements,
            jobs=(("1", elements),),
        ).save()
        describe(folder, {}, {"pixart.parent_checkpoint": "/elsewhere/step-1"} if kind == "train" else {})
        set_status(folder, status)
        os.utime(folder / "logs", (time.time() + 125, time.time() + 125))
    return tmp_path


def test_newest_first_with_states_and_durations(home, capsys):
    assert launch.main(["runs", "--home", str(home)]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["run", "kind", "state", "begun", "duration", "dataset", "started", "from"]
    assert [row.split()[0] for row in rows] == [
        "20260101-000002-caption-abcd",
        "20260101-000001-train-abcd",
        "20260101-000000-train-abcd",
    ]
    assert "2 failed" in rows[0]  # its processes have ended without data
    assert "failed" in rows[1]
    assert "finished" in rows[2]
    assert "0 h 02 min" in rows[2]
    assert "datasets/demo" in rows[2]
    assert rows[2].endswith("/elsewhere/step-1")


def test_number_and_kind(home, capsys):
    assert launch.main(["runs", "--home", str(home), "--number", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[2] == "and 2 older runs; list them with --number 3"
    assert launch.main(["runs", "--home", str(home), "--kind", "caption"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert launch.main(["runs", "--home", str(home), "--kind", "audit"]) == 2
    assert "has no runs of the kind 'audit'" in capsys.readouterr().err


def test_a_run_without_metadata_is_listed(home, capsys):
    record = home / "runs/20260101-000000-train-abcd"
    (record / "tracking.json").unlink()
    assert json.loads((record / "run.json").read_text())["kind"] == "train"
    assert launch.main(["runs", "--home", str(home)]) == 0
    assert "unknown" in capsys.readouterr().out


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (59.4, "59 s"), (61, "0 h 01 min"), (90_000, "25 h 00 min")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text
