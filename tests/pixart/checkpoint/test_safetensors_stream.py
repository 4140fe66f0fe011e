"""Safetensors files of any size, with and without direct I/O, compared with the reader of the safetensors library."""

import errno
import fcntl
import os

import pytest
import torch
from safetensors.torch import load_file

from pixart.checkpoint import safetensors_stream
from pixart.checkpoint.safetensors_stream import BLOCK, differing_tensors, map_tensors, save_tensors

DTYPES = (torch.float32, torch.bfloat16, torch.uint8)


@pytest.fixture(params=["direct", "refused at open", "refused at use"])
def _file_system(request, monkeypatch):
    """File system of the tests, with and without direct I/O."""
    if request.param == "direct":
        return
    original = {name: getattr(os, name) for name in ("open", "pwrite", "preadv")}

    def open_without_direct(path, flags, *mode):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return original["open"](path, flags, *mode)

    def transfer_without_direct(name):
        def transfer(descriptor, *arguments):
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(errno.EOPNOTSUPP, "Operation not supported")
            return original[name](descriptor, *arguments)

        return transfer

    if request.param == "refused at open":
        monkeypatch.setattr(os, "open", open_without_direct)
    else:
        for name in ("pwrite", "preadv"):
            monkeypatch.setattr(os, name, transfer_without_direct(name))


@pytest.mark.usefixtures("_file_system")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK, 5 * BLOCK + 3], ids=str)
def test_round_trip(tmp_path, monkeypatch, dtype, size):
    """Tensors end before, at and after the ends of blocks and of a buffer of two blocks."""
    monkeypatch.setattr(safetensors_stream, "BUFFER", 2 * BLOCK)
    state = {
        "first": torch.arange(size).to(dtype),
        "scalar": torch.ones((), dtype=dtype),
        "transposed": torch.arange(12).view(3, 4).to(dtype).t(),
        "last": torch.arange(2 * size).to(dtype),
    }
    path = tmp_path / "x.safetensors"
    save_tensors(state, path)
    for loaded in (load_file(path), map_tensors(path)):
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[name], tensor) and loaded[name].dtype == dtype for name, tensor in state.items())
    assert differing_tensors(path, state) == []
    for name, tensor in state.items():
        if tensor.numel():
            altered = tensor.contiguous().clone()
            altered.view(-1).view(torch.uint8)[-1] ^= 1
            assert differing_tensors(path, {**state, name: altered}) == [name]
    others = {"absent": state["scalar"], "scalar": torch.ones(1, dtype=dtype), "first": state["first"].double()}
    assert differing_tensors(path, {**state, **others}) == ["first", "scalar", "absent"]


def test_empty_state_and_missing_folder(tmp_path):
    save_tensors({}, tmp_path / "x")
    assert load_file(tmp_path / "x") == {}
    with pytest.raises(OSError, match="No such file"):
        save_tensors({}, tmp_path / "absent" / "x")


def test_a_longer_file_is_overwritten(tmp_path):
    save_tensors({"a": torch.zeros(100_000)}, tmp_path / "x")
    save_tensors({"a": torch.ones(3)}, tmp_path / "x")
    assert load_file(tmp_path / "x")["a"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("writes", [0, 1, 4], ids=["first write", "second write", "header"])
def test_a_full_disk_raises(tmp_path, monkeypatch, writes):
    monkeypatch.setattr(safetensors_stream, "BUFFER", 2 * BLOCK)
    original, offsets = os.pwrite, []

    def write_until_full(descriptor, data, offset):
        if len(offsets) == writes:
            raise OSError(errno.ENOSPC, "No space left on device")
        offsets.append(offset)
        return original(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", write_until_full)
    with pytest.raises(OSError, match="No space left"):
        save_tensors({"a": torch.zeros(2 * BLOCK)}, tmp_path / "x")
