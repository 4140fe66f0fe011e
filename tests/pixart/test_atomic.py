"""Atomic files and folders, and the removal of what killed processes left."""

import os
import signal
import subprocess
import sys
import time

import pytest

from pixart import atomic
from pixart.atomic import atomic_directory, remove_leftovers, temporary_path, write_atomically

WRITER = """
import sys, time
from pathlib import Path
from pixart.atomic import atomic_directory, atomic_path
context = {"file": atomic_path, "folder": atomic_directory}[sys.argv[1]]
with context(Path(sys.argv[2])) as temporary:
    (temporary / "part" if sys.argv[1] == "folder" else temporary).write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["file", "folder"])
def writer(request, tmp_path):
    """Process that is writing `target`, and the way it writes."""
    words = [sys.executable, "-c", WRITER, request.param, str(tmp_path / "target")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    yield process, request.param
    process.kill()
    process.wait()


def write(kind, target):
    if kind == "file":
        write_atomically(target, "complete")
        return target.read_text()
    with atomic_directory(target) as partial:
        (partial / "part").write_text("complete")
    return (target / "part").read_text()


def test_leftovers_of_a_killed_process_are_removed_by_the_next_writer(writer, tmp_path):
    process, kind = writer
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert write(kind, tmp_path / "target") == "complete"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_temporary_files_of_a_living_process_are_kept(writer, tmp_path):
    process, kind = writer
    assert write(kind, tmp_path / "target") == "complete"
    assert len(list(tmp_path.iterdir())) == 2
    process.terminate()
    process.wait()


def test_another_host_and_another_name_are_left_alone(tmp_path, monkeypatch):
    target = tmp_path / "step-1"
    monkeypatch.setattr(atomic, "host", lambda: "other")
    foreign = temporary_path(target)
    monkeypatch.undo()
    longer = temporary_path(tmp_path / "step-1.fp8")
    unowned = tmp_path / ".step-1.0123abcd.partial"
    for path in (foreign, longer, unowned):
        path.write_text("")
    monkeypatch.setattr(atomic, "is_alive", lambda path, host, pid: host != atomic.host())
    assert remove_leftovers(target) == []
    monkeypatch.undo()
    abandoned = time.time() - atomic.ABANDONED_SECONDS - 60
    os.utime(foreign, (abandoned, abandoned))
    assert remove_leftovers(target) == [foreign]
    assert sorted(tmp_path.iterdir()) == sorted([longer, unowned])


def test_an_error_leaves_the_old_content_and_no_temporary_file(tmp_path):
    write_atomically(tmp_path / "file", "old")

    def fail(kind):
        if kind == "file":
            with atomic.atomic_path(tmp_path / "file") as temporary:
                temporary.write_text("half")
                raise OSError("disk")
        with atomic_directory(tmp_path / "folder") as partial:
            (partial / "part").write_text("half")
            raise OSError("disk")

    for kind in ("file", "folder"):
        with pytest.raises(OSError, match="disk"):
            fail(kind)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "old")]
