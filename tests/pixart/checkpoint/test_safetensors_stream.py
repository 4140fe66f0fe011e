"""Files of tensors: read back by safetensors' own reader, whatever their size, on any file system."""

import errno
import os

import pytest
import torch
from safetensors.torch import load_file

from pixart.checkpoint import safetensors_stream
from pixart.checkpoint.safetensors_stream import BLOCK, differing, map_tensors, save_tensors

DTYPES = (torch.float32, torch.bfloat16, torch.uint8)


@pytest.fixture(params=[True, False], ids=["direct", "cached"])
def _file_system(request, monkeypatch):
    """As it is, and as one that refuses direct writing."""
    if request.param:
        return
    real = os.open

    def refusing(path, flags, *mode):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", refusing)


@pytest.mark.usefixtures("_file_system")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK, 5 * BLOCK + 3], ids=str)
def test_read_back(tmp_path, monkeypatch, dtype, size):
    """With a buffer of two blocks, tensors end on either side of its end, and of a block's."""
    monkeypatch.setattr(safetensors_stream, "BUFFER", 2 * BLOCK)
    state = {
        "first": torch.arange(size).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
        "transposed": torch.arange(12).view(3, 4).to(dtype).t(),
        "last": torch.arange(2 * size).to(dtype),
    }
    path = tmp_path / "x.safetensors"
    save_tensors(state, path)
    for found in (load_file(path), map_tensors(path)):
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], tensor) and found[name].dtype == dtype for name, tensor in state.items())
    assert differing(path, state) == []
    for name, tensor in state.items():
        if tensor.numel():
            altered = tensor.contiguous().clone()
            altered.view(-1).view(torch.uint8)[-1] ^= 1
            assert differing(path, {**state, name: altered}) == [name]
    others = {"absent": state["scalar"], "scalar": torch.ones(1, dtype=dtype), "first": state["first"].double()}
    assert differing(path, {**state, **others}) == ["first", "scalar", "absent"]


def test_no_tensors_and_a_full_name(tmp_path):
    save_tensors({}, tmp_path / "x")
    assert load_file(tmp_path / "x") == {}
    with pytest.raises(OSError, match="No such file"):
        save_tensors({}, tmp_path / "absent" / "x")


def test_written_over(tmp_path):
    save_tensors({"a": torch.zeros(100_000)}, tmp_path / "x")
    save_tensors({"a": torch.ones(3)}, tmp_path / "x")
    assert load_file(tmp_path / "x")["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("writes", [0, 1, 4], ids=["the first", "the second", "the header"])
def test_a_full_disk_is_told(tmp_path, monkeypatch, writes):
    monkeypatch.setattr(safetensors_stream, "BUFFER", 2 * BLOCK)
    real, done = os.pwrite, []

    def full(descriptor, data, place):
        if len(done) == writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        done.append(place)
        return real(descriptor, data, place)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        save_tensors({"a": torch.zeros(2 * BLOCK)}, tmp_path / "x")
