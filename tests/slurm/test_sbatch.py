"""Submissions while Slurm's controller does not answer."""

from pathlib import Path

import pytest
from submitit.core.utils import FailedJobError

from slurm import commands
from slurm.commands import SlurmError, SlurmUnavailableError
from slurm.sbatch import submitted_once

NO_ANSWER = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"


class Clock:
    """A clock that only `sleep` moves, and the pauses that it was asked for."""

    def __init__(self) -> None:
        self.pauses: list[float] = []

    def monotonic(self) -> float:
        return sum(self.pauses)

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)


@pytest.fixture
def pauses(monkeypatch) -> list[float]:
    """List of the pauses between attempts, which take no time."""
    clock = Clock()
    monkeypatch.setattr(commands, "time", clock)
    return clock.pauses


class Controller:
    """A submission that is answered after some attempts; each attempt may leave a job without an answer."""

    def __init__(self, folder: Path, unanswered: int, error: str = NO_ANSWER) -> None:
        self.folder, self.unanswered, self.error, self.attempts = folder, unanswered, error, 0

    def submit(self) -> str:
        self.attempts += 1
        if self.attempts <= self.unanswered:
            raise FailedJobError(f"Command failed\n{self.error}")
        return "9"


def test_a_job_that_was_accepted_without_an_answer_is_cancelled(programs, pauses, tmp_path):
    """Jobs that submitit has recorded, and those of other folders, continue."""
    folder = tmp_path / "my run" / "logs"
    folder.mkdir(parents=True)
    (folder / "5_submission.sh").touch()
    listing = "\n".join(f"{job}|{script}" for job, script in ((5, folder / "a"), (6, folder / "b"), (7, "/other/c")))
    programs(squeue=f"echo '{listing}'", scancel=f'echo "$@" >> {tmp_path}/cancelled')
    controller = Controller(folder, unanswered=2)
    assert submitted_once(folder, controller.submit) == "9"
    assert controller.attempts == 3
    assert (tmp_path / "cancelled").read_text() == "6\n6\n"  # before each further attempt
    assert pauses == [commands.FIRST_PAUSE_SECONDS, 2 * commands.FIRST_PAUSE_SECONDS]


def test_nothing_is_submitted_while_the_jobs_cannot_be_listed(programs, pauses, tmp_path):
    """No list of the jobs is to be had at first: without it, a further attempt might submit the job twice."""
    counted = f"echo >> {tmp_path}/calls; test $(wc -l < {tmp_path}/calls) -gt 3"
    programs(squeue=f"{counted} || {{ echo 'squeue: error: Socket timed out' >&2; exit 1; }}")
    controller = Controller(tmp_path, unanswered=1)
    assert submitted_once(tmp_path, controller.submit) == "9"
    assert controller.attempts == 2
    assert len(pauses) == 4


def test_the_first_attempt_lists_nothing(programs, tmp_path):
    programs(squeue="exit 1", scancel="exit 1")
    assert submitted_once(tmp_path, Controller(tmp_path, unanswered=0).submit) == "9"


def test_a_refusal_is_no_missing_answer(programs, pauses, tmp_path):
    controller = Controller(tmp_path, unanswered=9, error="sbatch: error: Invalid account or account/partition")
    with pytest.raises(SlurmError, match=r"^sbatch: Invalid account or account/partition$") as raised:
        submitted_once(tmp_path, controller.submit)
    assert not isinstance(raised.value, SlurmUnavailableError)
    assert controller.attempts == 1
    assert pauses == []


def test_patience_ends(programs, pauses, tmp_path):
    programs(squeue="true")
    with pytest.raises(SlurmUnavailableError, match="Socket timed out"):
        submitted_once(tmp_path, Controller(tmp_path, unanswered=10**9).submit)
    assert commands.PATIENCE_SECONDS - commands.MAX_PAUSE_SECONDS < sum(pauses) < commands.PATIENCE_SECONDS
