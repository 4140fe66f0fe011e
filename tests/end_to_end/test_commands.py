"""The three commands as they are written, and bad input to each, as a user gives them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import ledger
from pixart import checkpoint as checkpoints


def run(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PIXART_", "MLFLOW_"))}
    words = command.replace("python", sys.executable, 1).split(" ")
    return subprocess.run(words, capture_output=True, text=True, cwd=folder, env=environment, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("bare")


@pytest.mark.slow
def test_the_three_commands_as_written(folder, shared_data):
    shutil.copy(shared_data / "legacy/dev_stage1.pt", folder / "ckpt.pt")

    done = run(folder, "python -m jobs.launch caption --array 0-255")
    assert done.returncode == 0, done.stderr
    dataset = folder / "outputs/datasets/demo"
    assert f"{dataset}/captions" in done.stdout
    entries = ledger.entries(dataset, "caption", list(range(256)))
    assert len(entries) == 256
    assert sum(entry.valid for entry in entries.values()) == ledger.manifest(dataset)["images"]

    done = run(folder, "python -m conversion.to_fp8 ckpt.pt")
    assert done.returncode == 0, done.stderr
    assert "written     ckpt.fp8" in done.stdout
    assert len(checkpoints.load(folder / "ckpt.fp8").plan.linears) == 24

    done = run(folder, "python -m jobs.launch train --nodes 4")
    assert done.returncode == 0, done.stdout + done.stderr
    last = next(line for line in done.stdout.splitlines() if "checkpoint" in line).split()[-1]
    saved = checkpoints.load(last)
    assert (saved.stage, saved.step) == (1, 350)
    logs = list((Path(last).parents[1] / "logs").glob("*_log.out"))
    assert len(logs) == 4  # ranks


def tree(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("python -m jobs.launch paint", "paint"),
        ("python -m jobs.launch", "JOB"),
        ("python -m jobs.launch caption --cluster nowhere", "unknown cluster profile 'nowhere'"),
        ("python -m jobs.launch caption --array 5-2", "'5-2'"),
        ("python -m jobs.launch caption --array a", "'a'"),
        ("python -m jobs.launch caption --array -1", "--array"),
        ("python -m jobs.launch caption --array=-1", "'-1'"),
        ("python -m jobs.launch caption --array ", "''"),
        ("python -m jobs.launch caption --recipe nothing", "unknown recipe 'nothing'"),
        ("python -m jobs.launch caption --set data.sauce=demo", "'data.sauce'"),
        ("python -m jobs.launch caption --set data.source=/no/such/folder", "/no/such/folder"),
        ("python -m jobs.launch caption --set data.vae=/no/such/vae", "/no/such/vae"),
        ("python -m jobs.launch caption --set data.shards=0", "data.shards=0"),
        ("python -m jobs.launch train --nodes 0", "'0'"),
        ("python -m jobs.launch train --stage 3", "3"),
        ("python -m jobs.launch train --stage 2", "conversion.to_fp8"),
        ("python -m jobs.launch train --from nowhere", "nowhere"),
        ("python -m jobs.launch train --from broken.pt", "no checkpoint directory"),
        ("python -m jobs.launch train --from truncated", "truncated"),
        ("python -m jobs.launch train --resume nowhere", "nowhere"),
        ("python -m jobs.launch train --nodes 3", "does not divide over 3 ranks"),
        ("python -m jobs.launch convert nowhere", "nowhere"),
        ("python -m jobs.launch sample nowhere", "nowhere"),
        ("python -m conversion.to_fp8 nowhere.pt", "nowhere.pt"),
        ("python -m conversion.to_fp8 broken.pt", "broken.pt"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_nothing_written(tmp_path, stage1, command, message):
    (tmp_path / "broken.pt").write_text("no checkpoint")
    weights = checkpoints.save(stage1, tmp_path / "truncated") / "transformer" / checkpoints.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-10])
    before = tree(tmp_path)
    done = run(tmp_path, command)
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert tree(tmp_path) == before
