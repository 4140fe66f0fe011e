"""The commands about runs answer quickly in a home folder with many of them."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.state import ledger
from jobs.state.run import Run
from jobs.state.run_metadata import PROFILE, Status, describe, set_status
from jobs.tracking.mlflow_store import STATE
from slurm import profile as profiles
from slurm.task import ATTEMPTS
from slurm.usage import FILE

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
RUNS, SHARDS, SMALL = 1000, 10_000, 10  # two runs have SHARDS, the others SMALL shards each
ACTIVE = 50  # runs whose jobs Slurm is asked about
MOST_SECONDS = 2.0
ENTRY = ledger.Entry(manifest="m", inputs="", rows=16, valid=16, checksum="c", seconds=60.0, versions={})


def make_run(home: Path, number: int, shards: int, finished: int) -> Path:
    """Make a run of an array with what its submission and its finished tasks write, and return its folder."""
    folder = home / "runs" / f"20260101-{number:06d}-caption-abcd"
    (folder / "logs").mkdir(parents=True)
    job = str(100_000 + number)
    run = Run(
        folder=folder,
        kind="caption",
        executor="slurm",
        dataset=str(home / "datasets" / str(number)),
        total=shards,
        elements=tuple(range(shards)),
        jobs=tuple((f"{job}_{shard}", (shard,)) for shard in range(shards)),
    )
    run.save()
    (folder / "command.txt").write_text("caption\n")
    (folder / PROFILE).write_text(json.dumps(dataclasses.asdict(profiles.load("dev"))))
    describe(folder, {"dataset": run.dataset})
    status: Status = "RUNNING" if finished < shards else "FINISHED"
    set_status(folder, status)
    sent = {"uri": "", "run_id": "", "offsets": {}, "sending": None, "tags": {}, "status": status}
    (folder / STATE).write_text(json.dumps(sent))  # so that `status` starts no synchronization
    entries = ledger.path(run.dataset, "caption", 0).parent
    entries.mkdir(parents=True)
    text, usage = json.dumps(dataclasses.asdict(ENTRY)), []
    for shard in range(finished):
        (entries / f"{shard:05d}.json").write_text(text)
        identity = {"job": f"{job}_{shard}", "rank": 0, "restart": 0, "node": f"n{shard % 8}"}
        usage.append({**identity, "seconds": 70.0, "processor_seconds": 60.0, "memory_bytes": 1 << 30})
    starts = [{**line, "arguments": [[0]], "time": "2026-01-01T00:00:00"} for line in usage]
    for name, lines in ((ATTEMPTS, starts), (FILE, usage)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def copy_run(folder: Path, number: int) -> None:
    """Copy the records of a run under another number."""
    copy = folder.parent / f"20260101-{number:06d}-caption-abcd"
    (copy / "logs").mkdir(parents=True)
    for path in folder.iterdir():
        if path.is_file():
            (copy / path.name).write_text(path.read_text().replace(folder.name, copy.name))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Home folder with many runs; of the two newest, one has half of its shards pending, the other all of them done."""
    folder = tmp_path_factory.mktemp("home")
    active, ended = (make_run(folder, number, SMALL, finished) for number, finished in ((0, 5), (1, SMALL)))
    for number in range(2, RUNS - 2):
        copy_run(active if number < ACTIVE else ended, number)
    for number, finished in ((RUNS - 2, SHARDS // 2), (RUNS - 1, SHARDS)):
        make_run(folder, number, SHARDS, finished)
    return folder


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("runs",), "5000 done, 5000 pending"),
        (("runs", "--number", str(RUNS)), "5000 done, 5000 pending"),
        (("status", "000998"), "5000  Resources"),
        (("status", "000999"), "processors per task"),
    ],
)
def test_answers_in_two_seconds(home, programs, words, expected):
    """The fastest of three processes counts, because other programs disturb them; Slurm's commands stand in."""
    waiting = f"{100_000 + RUNS - 2}_[{SHARDS // 2}-{SHARDS - 1}]|PENDING|N/A|Resources"
    programs(squeue=f"echo '{waiting}'", sacct="true")
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        command = [sys.executable, "-m", "jobs.launch", *words, "--home", str(home)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        seconds.append(time.perf_counter() - begun)
        assert expected in done.stdout, done.stdout + done.stderr
    assert min(seconds) < MOST_SECONDS, seconds
