"""Commands of an ordinary user who may read the home folder of somebody else and write nowhere but in /tmp."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.attack.campaign import Campaign, campaign, is_long
from tests.support.demo_fixture import Demo
from tests.support.environment import bare_environment

USERS = (65534, 54321) if is_long() else (54321,)  # the second one has no name
SECONDS = 60  # that a command may take
READABLE = "-all,+dac_read_search"  # the interpreter may lie in a folder that only root may search


def as_user(user: int, words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of the launcher in a folder as a user whose home is that folder."""
    setpriv = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", f"--inh-caps={READABLE}"]
    command = [*setpriv, f"--ambient-caps={READABLE}", sys.executable, "-m", "jobs.launch", *words]
    environment = {**bare_environment(), "HOME": str(folder), "USER": "", "LOGNAME": ""}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)


def commands(demo: Demo) -> list[list[str]]:
    """Return commands that read the demo, and commands that would write into it."""
    run, checkpoint = str(demo.runs("train")[0]), str(next(demo.home.glob("runs/*/checkpoints/step-*")))
    reading = [["status"], ["runs"], ["status", run], ["lineage", checkpoint], ["train", "--dry-run"]]
    if is_long():
        reading += [["logs", run], ["open", "--print", run], ["doctor"], ["estimate"], ["sample", run, "--dry-run"]]
        reading += [["lineage", str(demo.sheet)], ["verify", "--dry-run"], ["audit", "--dry-run"], ["config"]]
    writing = [["train"], ["release", checkpoint]]
    if is_long():
        writing += [["sync"], ["retry", run], ["cancel", run], ["train", "--resume", run], ["caption"], ["latents"]]
        writing += [["audit"], ["verify"], ["sample", run], ["convert", checkpoint], ["evaluate", run], ["demo"]]
        writing += [["init", "--set", f"data.path={demo.folder}/other"]]
    return reading + writing


def state(folder: Path) -> dict[Path, float]:
    return {path: path.stat().st_mtime for path in folder.rglob("*")}


def attempt(attack: Campaign, user: int, words: list[str], folder: Path) -> None:
    """Try one command: it ends with 0, 1 or 2, and prints no traceback; an error has one line."""
    label = f"{' '.join(words)} of user {user}"
    done = attack.attempt(label, lambda: as_user(user, words, folder))
    if done is None:
        return
    if "Traceback" in done.stdout + done.stderr:
        attack.figures.tracebacks += 1
        attack.failures.append(f"{label}: {done.stderr[-3000:]}")
    elif done.returncode not in (0, 1, 2):
        attack.wrong(label, f"exit code {done.returncode}")
    elif done.returncode == 2:
        attack.figures.refused += 1
        lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
        if len(lines) != 1:
            attack.wrong(label, f"not one line of an error: {done.stderr[-1000:]}")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="needs setpriv, as root")
def test_commands_of_an_ordinary_user_in_a_read_only_home(small_demo: Demo, record_property):
    attack = campaign("a read-only home", short=1, long=1)
    before = state(small_demo.folder)
    for user in USERS:
        for words in commands(small_demo):
            attempt(attack, user, words, small_demo.folder)
    assert state(small_demo.folder) == before
    attack.finish(record_property)
