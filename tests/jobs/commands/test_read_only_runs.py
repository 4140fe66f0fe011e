"""Runs on a read-only file system, such as an archive or another user's folder."""

import os
import subprocess

import pytest

from jobs import launch
from tests.jobs.tracking.test_sync import make_training


@pytest.fixture
def archive(tmp_path):
    """Folder that is a separate file system, which can be remounted read-only."""
    folder = tmp_path / "archive"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("needs to mount a file system, as root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_read_only_runs_are_shown(archive, capfd):
    run = make_training(archive, 3)
    assert launch.main(["open", "--print", "--home", str(archive)]) == 0
    subprocess.run(["mount", "-o", "remount,ro", str(archive)], check=True)
    capfd.readouterr()
    assert launch.main(["status", "--home", str(archive)]) == 0
    assert launch.main(["open", "--print", "--home", str(archive)]) == 0
    output = capfd.readouterr()
    assert "step 3 of 3" in output.out
    assert output.out.endswith(f"{run.folder}/summary.html\n")
    assert launch.main(["sync", "--home", str(archive)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith("Read-only file system")
