"""Pickled records are read exactly, and a pickle that names anything else runs nothing."""

import io
import os
import pickle
import pickletools
from pathlib import Path

import numpy as np
import pytest

from pixart.data.adoption.pickles import read_record

LATENT = np.arange(-8, 8, dtype=np.int16).reshape(4, 2, 2)


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("label", [7, np.int64(7), np.int32(7), np.uint8(7)])
def test_records_are_those_that_were_pickled(protocol, label):
    record = read_record(pickle.dumps({"latent": LATENT, "label": label}, protocol=protocol))
    assert record["label"] == 7
    assert isinstance(record["label"], int)
    assert record["latent"].dtype == np.int16
    assert (record["latent"] == LATENT).all()
    texts = {"latent": LATENT, "short_caption": "a dog", "long_caption": "é \N{DOG FACE}"}
    assert read_record(pickle.dumps(texts, protocol=protocol))["long_caption"] == texts["long_caption"]


def test_arrays_in_the_order_of_fortran_and_of_the_older_numpy_are_read():
    record = read_record(pickle.dumps({"latent": np.asfortranarray(LATENT)}, protocol=4))
    assert (record["latent"] == LATENT).all()
    content = pickle.dumps({"latent": LATENT}, protocol=2)
    assert b"numpy._core.multiarray" in content
    older = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert (read_record(older)["latent"] == LATENT).all()


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


def test_functions_that_run_commands_are_not_called(tmp_path: Path):
    marker = tmp_path / "ran"
    command = f"touch {marker}"
    for call in (
        Call(os.system, command),
        Call(eval, f"open({str(marker)!r}, 'w')"),
        Call(exec, f"open({str(marker)!r}, 'w')"),
        Call(getattr, "text", "upper"),
        Call(io.open, str(marker), "w"),
        Call(np.load, str(marker), None, True),
        Call(np.memmap, str(marker), "u1", "w+", 0, (8,)),
        Call(pickle.loads, pickle.dumps(Call(os.system, command))),
        Call(bytearray, 10),
    ):
        for content in ({"latent": LATENT, "label": call}, call, {"latent": call}):
            with pytest.raises(
                ValueError, match=r"is not a pickled record: the name \S+, which no record of latents has"
            ):
                read_record(pickle.dumps(content, protocol=4))
    assert not marker.exists()


KNOWN = b"cnumpy\nndarray\n"
RECONSTRUCT = b"cnumpy._core.multiarray\n_reconstruct\n"


@pytest.mark.parametrize(
    "content",
    [
        b"Pname\n.",  # a persistent id
        KNOWN + b"}(S'x'\nI1\nub.",  # attributes of a known name
        KNOWN + b"N}(S'__call__'\nI1\nu\x86b.",
        b"c_codecs\nencode\nN}(S'__defaults__'\nNu\x86b.",
        KNOWN + b"((I1000000000000\ntS'i2'\ntR.",  # an array that numpy would allocate
        RECONSTRUCT + b"(" + KNOWN + b"(I1000000000000\ntS'b'\ntR.",
        b"cnumpy\ndtype\n(S'O'\ntR.",
        b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
        b"I1\n.",
        b"}(I1\nI2\nu.",
        b"",
        b".",
        b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        pickle.dumps({"latent": np.array([None])}),
        pickle.dumps({"latent": np.array([1.5])}),
        pickle.dumps({"latent": LATENT.astype(">i2")}),
        pickle.dumps({"latent": np.array([(1,)], dtype=[("a", "i2")])}),
        pickle.dumps({"latent": LATENT.view(np.recarray)}),
        pickle.dumps({"latent": LATENT})[:-40],
    ],
)
def test_pickles_of_anything_else_are_refused_in_one_line(content: bytes):
    with pytest.raises(ValueError, match="is not a pickled record") as caught:
        read_record(content)
    assert "\n" not in str(caught.value)


def test_the_names_of_a_record_are_the_five_that_are_known():
    content = pickle.dumps({"latent": LATENT, "label": np.int64(3)}, protocol=2)
    names = {argument for opcode, argument, _ in pickletools.genops(content) if opcode.name == "GLOBAL"}
    assert names == {
        "numpy._core.multiarray _reconstruct",
        "numpy._core.multiarray scalar",
        "numpy ndarray",
        "numpy dtype",
        "_codecs encode",
    }
