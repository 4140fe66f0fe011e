"""Runs of somebody else, or of an archive, which may be read and not written to."""

import os
import subprocess

import pytest

from jobs import launch
from tests.jobs.tracking.test_sync import make_training


@pytest.fixture
def archive(tmp_path):
    """A file system that can be made one to read only."""
    folder = tmp_path / "archive"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("needs to mount a file system, as root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_what_cannot_be_written_to_is_still_shown(archive, capfd):
    run = make_training(archive, 3)
    assert launch.main(["open", "--print", "--home", str(archive)]) == 0
    subprocess.run(["mount", "-o", "remount,ro", str(archive)], check=True)
    capfd.readouterr()
    assert launch.main(["status", "--home", str(archive)]) == 0
    assert launch.main(["open", "--print", "--home", str(archive)]) == 0
    told = capfd.readouterr()
    assert "step 3 of 3" in told.out
    assert told.out.endswith(f"{run.folder}/summary.html\n")
    assert launch.main(["sync", "--home", str(archive)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.endswith("Read-only file system")
