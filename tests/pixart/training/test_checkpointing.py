"""The folder of a run's checkpoints: whose files are removed, and that one process at a time trains a run."""

import logging
import shutil
import subprocess
import sys

import pytest

from pixart.atomic import temporary_path
from pixart.checkpoint.directory import MARKER
from pixart.training import checkpointing
from pixart.training.checkpointing import CheckpointManager, remove, run_lock
from pixart.training.process_group import process_group

HOLDER = """
import sys, time
from pathlib import Path
from pixart.training.checkpointing import run_lock
from pixart.training.process_group import process_group
with process_group() as ranks, run_lock(Path(sys.argv[1]), ranks):
    print("locked", flush=True)
    time.sleep(120)
"""


@pytest.fixture
def ranks():
    with process_group() as ranks:
        yield ranks


def test_new_manager_removes_leftovers_of_training_but_not_of_a_conversion(tmp_path, ranks):
    folder = tmp_path / "checkpoints"
    of_training = folder / ".step-00000400.partial"
    conversion = temporary_path(folder / "step-00000400.fp8")
    earlier_conversion = folder / ".step-00000400.fp8.0123abcd.partial"
    for path in (of_training, conversion, earlier_conversion):
        path.mkdir(parents=True)
    CheckpointManager(tmp_path, ranks, keep_last=1, keep_every=0).close()
    assert sorted(folder.iterdir()) == sorted([conversion, earlier_conversion])


def test_old_checkpoints_are_removed_without_being_read_if_none_is_kept(tmp_path, ranks):
    folders = [tmp_path / f"checkpoints/step-{step:08d}" for step in (1, 2, 3)]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / MARKER).write_text("{damaged")
    with pytest.raises(ValueError, match=MARKER):
        CheckpointManager(tmp_path, ranks, keep_last=1, keep_every=2).prune()
    CheckpointManager(tmp_path, ranks, keep_last=1, keep_every=0).prune()
    assert [folder.exists() for folder in folders] == [False, False, True]


@pytest.mark.slow
def test_a_run_is_trained_by_one_process_at_a_time(tmp_path, ranks):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "locked\n"
        message = f"is being trained by process {holder.pid} on "
        with pytest.raises(ValueError, match=message), run_lock(tmp_path, ranks):
            pass
    finally:
        holder.kill()
        holder.wait()
    with run_lock(tmp_path, ranks):  # a killed process holds no lock
        pass


def test_a_checkpoint_that_cannot_be_removed_is_a_warning_and_removed_later(tmp_path, monkeypatch, caplog):
    for step in (1, 2):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "file").write_text("")

    def refuse(path):
        raise OSError(16, "Device or resource busy", str(path))

    monkeypatch.setattr(checkpointing.shutil, "rmtree", refuse)
    with caplog.at_level(logging.WARNING):
        remove(tmp_path / "step-00000001")
    assert "is removed later" in caplog.text
    assert not (tmp_path / "step-00000001").exists()  # no reader takes it for a checkpoint
    monkeypatch.setattr(checkpointing.shutil, "rmtree", shutil.rmtree)
    monkeypatch.undo()
    remove(tmp_path / "step-00000002")
    assert list(tmp_path.iterdir()) == []
