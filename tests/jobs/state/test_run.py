"""Run folders, and what the commands report about them."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jobs.commands.options import RunOptions
from jobs.commands.runs import cancel, logs, status
from jobs.state import ledger
from jobs.state import run as runs
from jobs.state.journal import Journal
from jobs.state.run import Element, Run
from jobs.submission.launch import JobFailedError
from jobs.submission.wait import raise_first_failure
from slurm.task import RESULT

ENTRY = ledger.Entry(manifest="m", inputs="", rows=1, valid=1, checksum="c", seconds=1.0, versions={})


@pytest.fixture
def process():
    """ID of a process that is regarded as a local job."""
    job = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", "submitit"])
    yield str(job.pid)
    job.kill()
    job.wait()


def make_run(home: Path, name: str = "1-caption-a", jobs=(), shards: int = 4) -> Run:
    folder = home / "runs" / name
    (folder / "logs").mkdir(parents=True)
    (folder / "command.txt").write_text("caption\n")
    elements = tuple(range(shards))
    run = Run(
        folder=folder,
        kind="caption",
        executor="local",
        dataset=str(home / "data"),
        total=shards,
        elements=elements,
        jobs=tuple(jobs),
    )
    run.save()
    return run


def test_a_run_is_read_as_it_was_saved(tmp_path):
    run = make_run(tmp_path, jobs=[("12_0", (0, 2)), ("12_1", (1, 3)), ("13", (2,))])
    assert runs.load(run.folder) == run
    assert run.job_of() == {0: "12_0", 1: "12_1", 2: "13", 3: "12_1"}
    assert run.job_ids == ["12", "13"]


def test_find_run_by_part_of_its_name(tmp_path):
    with pytest.raises(ValueError, match="no runs"):
        runs.find(tmp_path, None)
    for name in ("1-caption-aa", "2-latents-bb", "3-latents-cc"):
        make_run(tmp_path, name)
    assert runs.find(tmp_path, None).folder.name == "3-latents-cc"
    assert runs.find(tmp_path, "bb").folder.name == "2-latents-bb"
    assert runs.find(tmp_path, str(tmp_path / "runs/1-caption-aa")).folder.name == "1-caption-aa"
    for name, message in (("latents", "2 runs"), ("zz", "no runs")):
        with pytest.raises(ValueError, match=message):
            runs.find(tmp_path, name)


def test_states_of_an_element(tmp_path, process, capsys):
    run = make_run(tmp_path, jobs=[(process, (0, 1)), ("999999991", (2, 3))])
    for shard in (0, 2):
        ledger.record(run.dataset, "caption", shard, ENTRY)
    run.log("999999991").write_text("submitit INFO begun\nTraceback:\nValueError: no such image\n\nsrun: error: n1\n")
    elements = runs.elements(run)
    assert [elements[shard].state for shard in range(4)] == ["done", "running", "done", "failed"]
    assert elements[3].note == "ValueError: no such image"
    assert runs.is_active(elements)

    assert status.run(status.Options(home=str(tmp_path), run=None)) == 1
    printed = capsys.readouterr().out
    assert "failed: shard 3, job 999999991: ValueError: no such image" in printed
    assert "retry 1-caption-a" in printed
    rows = {line.split()[0]: line.split()[1] for line in printed.splitlines() if line.split()[0] in status.STYLES}
    assert rows == {"done": "2", "running": "1", "failed": "1"}


def test_logs_of_one_shard(tmp_path, capsys):
    run = make_run(tmp_path, jobs=[("999999991", (0, 1)), ("999999992", (2, 3))])
    for job in ("999999991", "999999992"):
        run.log(job, stream="out").write_text(f"said by {job}\n")
    assert logs.run(logs.Options(home=str(tmp_path), run=None, shard=2)) == 0
    assert capsys.readouterr().out == "said by 999999992\n"
    logs.run(logs.Options(home=str(tmp_path), run=None))
    assert "said by 999999991" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no such shard"):
        logs.run(logs.Options(home=str(tmp_path), run=None, shard=9))


def test_logs_are_followed_to_the_end_of_the_jobs(tmp_path, process, capsys):
    run = make_run(tmp_path, jobs=[(process, (0,))], shards=1)
    log = run.log(process, stream="out")
    log.write_text("at first\n")

    def work() -> None:
        time.sleep(3 * logs.FOLLOW_SECONDS)
        with log.open("a") as file:
            file.write("later\n")
        ledger.record(run.dataset, "caption", 0, ENTRY)

    task = threading.Thread(target=work)
    task.start()
    assert logs.run(logs.Options(home=str(tmp_path), run=None, follow=True)) == 0
    task.join()
    assert capsys.readouterr().out == "at first\nlater\n"


def test_cancel_ends_active_jobs(tmp_path, process, capsys):
    make_run(tmp_path, jobs=[(process, (0, 1)), ("999999991", (2, 3))])
    cancel.run(RunOptions(home=str(tmp_path), run=None))
    assert "cancelled 1 jobs" in capsys.readouterr().out
    os.waitpid(int(process), 0)


def test_status_of_active_training_has_rate_and_remaining_time(tmp_path, process, capsys):
    """The rate is that of the last report; a run that has ended has none."""
    make_run(tmp_path, jobs=[(process, (0, 1))])
    folder = tmp_path / "runs/2-train-b"
    run = Run(folder=folder, kind="train", executor="local", dataset="", total=100, nodes=1, jobs=((process, ()),))
    folder.mkdir()
    run.save()
    journal = Journal(folder)
    for step in (1, 2):
        journal.metrics(step, {"train/loss": 0.5, "train/seconds_per_step": 30.0 * step})
    status.run(status.Options(home=str(tmp_path), run=None))
    assert "step 2 of 100, loss 0.5000, 1.0/min, 98.0 minutes left" in capsys.readouterr().out
    (folder / RESULT).write_text('"there"')
    status.run(status.Options(home=str(tmp_path), run=None))
    assert "step 2 of 100, loss 0.5000\n" in capsys.readouterr().out


def test_user_error_in_a_rank_is_one_line(tmp_path):
    """The rank that torch prepends to traceback lines of several ranks is removed."""
    run = make_run(tmp_path)
    for last in ("[rank3]: ValueError: batch=5: odd", "ValueError: batch=5: odd"):
        with pytest.raises(ValueError, match=r"^batch=5: odd$"):
            raise_first_failure(run, {2: Element(state="failed", job="7_2", note=last)})
    with pytest.raises(JobFailedError, match=r"caption shard 2 failed: KeyError: 'x'; its log is .*7_2_0_log\.err"):
        raise_first_failure(run, {2: Element(state="failed", job="7_2", note="KeyError: 'x'")})
