"""The cases of clusters and tracking, as unit tests; those on a real cluster are in `tests/end_to_end`."""

import logging
import os
import time
from datetime import datetime
from types import SimpleNamespace

import pytest

from jobs.state import ledger
from jobs.state import run as runs
from jobs.state.journal import Journal
from jobs.submission import wait
from jobs.tracking import node_agent
from jobs.tracking.mlflow_store import needs_sync
from pixart.training import checkpointing
from slurm import commands, limits, sbatch
from slurm.commands import SlurmError, SlurmUnavailableError
from tests.jobs.state.test_run import ENTRY, make_run
from tests.jobs.tracking.test_mlflow_store import begin, home, run_id, stored_points, try_sync

__all__ = ["home"]


def case(name):
    def register(function):
        return pytest.mark.parametrize("case", [name])(function)

    return register


def slurm_run(folder):
    run = make_run(folder, jobs=[("7_0", (0,)), ("7_1", (1,)), ("7_2", (2,))], shards=3)
    return runs.load(run.folder)


@case("`PreemptMode=CANCEL`")
def test_preempted(tmp_path, case):
    """Squeue no longer lists the job: it has ended, and `retry` does the rest."""
    states = commands.parse("7_0|PREEMPTED|2026-11-27T08:00:00|None\n7_1|RUNNING|Unknown|None")
    elements = runs.elements_by_state(slurm_run(tmp_path), states)
    assert [elements[shard].state for shard in (0, 1)] == ["failed", "running"]
    assert elements[0].note.startswith("preempted: ")


@case("sacct's `20_[0-18:2%1]`, and lists cut by `...`")
def test_array_expressions(case):
    assert list(commands.expand("20_[0-18:2%1]")) == [f"20_{index}" for index in range(0, 19, 2)]
    assert list(commands.expand("7_[1-2,5,...]")) == ["7_1", "7_2", "7_5"]
    assert commands.parse("20_[0-18:2%1]|PENDING|Unknown|None")["20_18"].pending


@case('squeue or sacct: "Socket timed out" in the middle of `--wait`')
def test_no_answer_while_waiting(tmp_path, monkeypatch, capsys, case):
    run, answers = slurm_run(tmp_path), []
    done = {shard: runs.Element(state="done", job="7") for shard in range(3)}

    def elements(_):
        answers.append(time.monotonic())
        if len(answers) < 4:
            raise SlurmUnavailableError("squeue: Socket timed out on send/recv operation")
        return done

    pauses = []
    monkeypatch.setattr(wait.runs, "elements", elements)
    monkeypatch.setattr(wait.time, "monotonic", lambda: sum(pauses))
    monkeypatch.setattr(wait.time, "sleep", pauses.append)
    assert [*wait.poll(run, 1.0)][-1] == done
    assert sum(pauses) == 1 + 2 + 4  # seconds: the pause doubles
    assert capsys.readouterr().err.count("Socket timed out") == 1


@case("sbatch refuses the third part of a split array (AssocMaxSubmitJobLimit)")
def test_a_refused_part(tmp_path, case):
    """One line; of the run, the parts that were accepted are known and the others can be retried."""
    output = (
        "sbatch: error: AssocMaxSubmitJobLimit\nsbatch: error: Batch job submission failed: Job violates accounting"
    )
    with pytest.raises(SlurmError, match=r"^sbatch: AssocMaxSubmitJobLimit$"), sbatch.refusals():
        raise sbatch.FailedJobError(output)
    run = make_run(tmp_path, jobs=[("7_0", (0, 1)), ("8_0", (2, 3))], shards=6)
    states = commands.parse("7_0|RUNNING|Unknown|None\n8_0|PENDING|Unknown|None")
    elements = runs.elements_by_state(runs.load(run.folder), states)
    assert [elements[shard].state for shard in range(6)] == ["running"] * 2 + ["pending"] * 2 + ["failed"] * 2
    assert elements[5].note == "was not submitted"


@case("job COMPLETED, result file visible 1 s later")
def test_a_result_that_is_not_visible_yet(tmp_path, case):
    run, now = slurm_run(tmp_path), datetime.now().isoformat(timespec="seconds")
    states = commands.parse(f"7_0|COMPLETED|{now}|None\n7_1|COMPLETED|2026-01-01T00:00:00|None")
    elements = runs.elements_by_state(run, states)
    assert (elements[0].state, elements[1].state) == ("running", "failed")
    ledger.record(run.dataset, "caption", 0, ENTRY)
    assert runs.elements_by_state(run, states)[0].state == "done"


@case("MLflow artifact root `s3://` without boto3; a 413 for one artifact")
def test_an_artifact_that_cannot_be_sent(home, monkeypatch, case):
    for error in (ModuleNotFoundError("No module named 'boto3'"), Refused("too large")):
        tracker, run = begin(home, f"a{type(error).__name__}")
        journal = Journal(run)
        (run / "report.html").write_text("x")
        journal.artifact(run / "report.html")
        journal.metrics(2, {"loss": 0.5})

        def refuse(*_, error=error):
            raise error

        monkeypatch.setattr(tracker, "send_file", refuse)
        try_sync(tracker, run)
        assert stored_points(tracker, run) == [("loss", 2, 0.5)]
        assert "report.html cannot be sent" in (run / "tracking.log").read_text()
        assert len((run / "tracking.log").read_text().splitlines()) == 1
        assert run_id(run)
        assert needs_sync(run) == isinstance(error, ModuleNotFoundError)


class Refused(Exception):  # noqa: N818 - as clients of HTTP name it
    response = SimpleNamespace(status_code=413)


@case("rmtree answers EBUSY (`.nfs...`) when an old checkpoint goes")
def test_a_busy_checkpoint(tmp_path, monkeypatch, caplog, case):
    (tmp_path / "step-00000001").mkdir()

    def refuse(path):
        raise OSError(16, "Device or resource busy", str(path))

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(checkpointing.shutil, "rmtree", refuse)
        checkpointing.remove(tmp_path / "step-00000001")
    assert "is removed later" in caplog.text
    assert not (tmp_path / "step-00000001").exists()


@case("nvidia-smi prints `[Unknown Error], 100, 50`")
def test_nvidia_smi(programs, case):
    programs(**{"nvidia-smi": "printf '[Unknown Error], 100, 50\\n30, 100, 70\\n'"})
    metrics = node_agent.gpu_metrics()
    assert metrics["gpu_utilization_percentage"] == 30
    assert metrics["gpu_power_usage_watts"] == 60


@case('`partition = "main,urgent"`')
def test_several_partitions(programs, case):
    programs(sinfo="printf 'main*|2:00:00|n1|gpu:8\\nurgent|1-00:00:00|n2|(null)\\n'")
    assert limits.partition("main,urgent") == limits.Partition(minutes=1440, nodes=1, gpus_per_node=8)


@case("the launcher within a job made with `--mem-per-cpu`")
def test_within_a_job(monkeypatch, case):
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_CPU": "300", "SLURM_CONF": "/conf"}.items():
        monkeypatch.setenv(name, value)
    with sbatch.outside_of_a_job():
        assert "SLURM_MEM_PER_CPU" not in os.environ
        assert os.environ["SLURM_CONF"] == "/conf"
