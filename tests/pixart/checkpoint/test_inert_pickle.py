"""Nothing in a pickle is imported or called; a value of an unknown class becomes inert."""

import argparse
import io
import pickle
import sys
from collections import OrderedDict, defaultdict
from fractions import Fraction

import numpy as np
import pytest
import torch

from pixart.checkpoint import inert_pickle
from pixart.checkpoint.inert import Inert, RefusedPickleError, as_value, describe


def load(content: bytes) -> object:
    return inert_pickle.load(io.BytesIO(content))


@pytest.mark.parametrize("protocol", range(2, 6))
def test_values_are_loaded(protocol):
    value = {"a": [1, 2.5, None, True, "text", b"bytes", (1,), {2}], "b": OrderedDict(c=1), "d": defaultdict(list, e=3)}
    assert load(pickle.dumps(value, protocol)) == value


@pytest.mark.parametrize("dtype", ["b1", "i1", "u2", "i4", "i8", "f2", "f4", "f8", "c8", ">i4", ">f8"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_numbers_of_numpy(dtype, shape):
    array = np.arange(max(1, int(np.prod(shape)))).reshape(shape).astype(dtype)
    native = array.astype(array.dtype.newbyteorder("="))
    if native.dtype != np.uint16:
        assert torch.equal(as_value(load(pickle.dumps(array, 2))), torch.from_numpy(native))
        assert torch.equal(as_value(load(pickle.dumps(array.copy(order="F"), 2))), torch.from_numpy(native))
    scalar = array.reshape(-1)[-1]
    assert load(pickle.dumps(scalar, 2)) == scalar.item()


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([{}], dtype=object), np.zeros(1, "i4,f4")])
def test_other_arrays_are_inert(array):
    value = as_value(load(pickle.dumps(array, 2)))
    assert isinstance(value, Inert)
    assert describe(value) == "numpy.ndarray"


@pytest.mark.parametrize("protocol", range(2, 6))
def test_unknown_class_is_not_imported(protocol):
    value = load(pickle.dumps(argparse.Namespace(lr=1e-4), protocol).replace(b"argparse", b"argpar5e"))
    assert isinstance(value, Inert)
    assert (describe(value), value.state) == ("argpar5e.Namespace", {"lr": 1e-4})
    assert "argpar5e" not in sys.modules
    assert describe(load(pickle.dumps(Fraction(1, 2), protocol))) == "fractions.Fraction"


REFUSED = {
    "system": b"cos\nsystem\n(S'true'\ntR.",
    "object by INST": b"(S'true'\nios\nsystem\n.",
    "eval": b"c__builtin__\neval\n(S'1'\ntR.",
    "method": b"cpathlib\nPath.mkdir\n(S'a'\ntR.",
    "attribute": b"cbuiltins\ngetattr\n(S'a'\nS'b'\ntR.",
    "registry": b"\x82\x01.",
    "call of a value": b"S'a'\n(tR.",
    "call of a tensor's dtype": b"ctorch\nfloat32\n(tR.",
    "attributes of a function": b"ctorch._utils\n_rebuild_tensor_v2\n}S'a'\nI1\nsb.",
    "append to a tuple": b")I1\na.",
}


@pytest.mark.parametrize("name", REFUSED)
def test_pickles_that_may_run_code_are_refused(name):
    with pytest.raises(RefusedPickleError, match=r"only tensors|not allowed"):
        load(REFUSED[name])


def test_names_are_printable():
    with pytest.raises(RefusedPickleError, match=r"os\.\\x1b\[31m, and only"):
        load(b"cos\n\x1b[31m\n.")
    assert load(b"ca\n\x1b[31m\n.").path == "a.\\x1b[31m"


def test_archive_in_memory():
    file = io.BytesIO()
    torch.save({"step": np.int64(3), "args": argparse.Namespace()}, file)
    assert inert_pickle.load_archive(file)["step"] == 3
    script = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), script)
    for content, cause in ((script.getvalue(), "TorchScript"), (pickle.dumps(1), "not a zip archive")):
        with pytest.raises(RefusedPickleError, match=cause):
            inert_pickle.load_archive(io.BytesIO(content))
