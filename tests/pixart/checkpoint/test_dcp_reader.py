"""Distributed checkpoints whose metadata or files are damaged, or try to run code or to read other files."""

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from pixart.checkpoint import dcp_reader
from pixart.checkpoint.dcp_reader import METADATA, MetadataUnpickler, read_training_state


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Folder of a distributed checkpoint of a small state."""
    state = {"model": {"weight": torch.arange(64.0), "bias": torch.ones(4, dtype=torch.bfloat16)}, "step": 3}
    dcp.save(state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    return tmp_path / "dcp"


def rewrite(checkpoint: Path, change) -> None:
    """Change the unpickled metadata of a checkpoint, and write it again."""
    metadata = pickle.loads((checkpoint / METADATA).read_bytes())
    change(metadata)
    (checkpoint / METADATA).write_bytes(pickle.dumps(metadata))


def test_complete_checkpoint_is_read(checkpoint):
    state = read_training_state(checkpoint)
    assert torch.equal(state["model"]["weight"], torch.arange(64.0))
    assert state["model"]["bias"].dtype == torch.bfloat16
    assert state["step"] == 3


def absolute(metadata):
    for info in metadata.storage_data.values():
        info.relative_path = "/etc/passwd"


def parent(metadata):
    for info in metadata.storage_data.values():
        info.relative_path = f"../dcp/{info.relative_path}"


def beyond(metadata):
    for info in metadata.storage_data.values():
        info.offset = 1 << 40


def negative(metadata):
    for info in metadata.storage_data.values():
        info.length = -5


def huge(metadata):
    metadata.state_dict_metadata["model.weight"].size = torch.Size([1 << 50])


def without_storage(metadata):
    metadata.storage_data = {}


@pytest.mark.parametrize("change", [absolute, parent, beyond, negative, huge, without_storage])
def test_metadata_that_points_elsewhere_is_refused(checkpoint, change):
    rewrite(checkpoint, change)
    with pytest.raises(ValueError, match="is damaged"):
        read_training_state(checkpoint)


def test_a_pipe_and_a_missing_file_are_refused(checkpoint):
    (data,) = checkpoint.glob("*.distcp")
    data.unlink()
    with pytest.raises(ValueError, match="is damaged"):
        read_training_state(checkpoint)
    os.mkfifo(data)  # reading it would wait forever
    with pytest.raises(ValueError, match="is damaged"):
        read_training_state(checkpoint)
    (checkpoint / METADATA).unlink()
    os.mkfifo(checkpoint / METADATA)
    with pytest.raises(ValueError, match="is damaged"):
        read_training_state(checkpoint)


def test_every_flipped_bit_of_the_metadata_is_read_or_refused(checkpoint):
    """No damage raises another exception than ValueError, also those of torch that are no Exception."""
    content = (checkpoint / METADATA).read_bytes()
    refused = 0
    for position in range(0, len(content), 5):
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        (checkpoint / METADATA).write_bytes(damaged)
        try:
            read_training_state(checkpoint)
        except ValueError:
            refused += 1
    assert refused > len(content) // 5 // 4


class Build:
    """Pickles as a class of an allowed module that is given attributes."""

    def __reduce__(self):
        return torch.Size, ((3,),), {"numel": "changed"}


# torch.float32(), and the module torch._utils, which pickle itself does not write
CALL = b"\x80\x04\x8c\x05torch\x8c\x07float32\x93)R."
MODULE = b"\x80\x04\x8c\x05torch\x8c\x06_utils\x93."


@pytest.mark.parametrize("content", [pickle.dumps(Build()), CALL, pickle.dumps(os.system), MODULE])
def test_pickles_that_run_code_or_change_a_class_are_refused(content):
    with pytest.raises(pickle.UnpicklingError, match=r"not allowed|must not"):
        MetadataUnpickler(io.BytesIO(content)).load()


def test_class_that_python_3_13_moved_is_accepted():
    content = pickle.dumps(Path("a"), protocol=2).replace(b"pathlib\nPosixPath", b"pathlib._local\nPosixPath")
    assert b"_local" in content
    assert MetadataUnpickler(io.BytesIO(content)).load() == Path("a")


def test_metadata_of_an_implausible_size_is_refused(checkpoint, monkeypatch):
    monkeypatch.setattr(dcp_reader, "MAX_METADATA_BYTES", 100)
    with pytest.raises(ValueError, match="is damaged"):
        read_training_state(checkpoint)
