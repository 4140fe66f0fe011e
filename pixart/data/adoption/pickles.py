"""Reading of the pickled records of an ArrayRecord without running any code that a record names.

A record is a dict of str and of numpy arrays or scalars. A pickle of such a dict names five functions and classes
(numpy's module is `numpy.core` before version 2). They are replaced by functions of this module, which accept integer
arrays only; every other name is refused before it is imported.
"""

import codecs
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
INTEGERS = ("i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
NATIVE = ("<", "|", "=", None)


class DType:
    """A numpy dtype in a pickle: an integer type with little-endian bytes."""

    def __init__(self, code: str, align: bool = False, copy: bool = True) -> None:
        if code not in INTEGERS:
            raise ValueError(f"an array of the type {code!r}, which is not an integer type")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in NATIVE or state[2:5] != (None, None, None):
            raise ValueError("an array whose type has fields or is big-endian")


class Known:
    """A function that a pickle may call and, unlike a function or a class of Python, cannot change."""

    __slots__ = ("function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise ValueError("a changed function")


def ndarray(*arguments: Any) -> None:
    """Refuse the call of `numpy.ndarray`, which in a pickle of numpy is only an argument of `_reconstruct`."""
    raise ValueError("an array that numpy has not pickled")


class Array:
    """A numpy array in a pickle, as `_reconstruct` makes it and its state fills it."""

    value: NDArray[Any] | None = None  # until its state is read

    def __init__(self, kind: object, shape: tuple[int, ...], code: bytes) -> None:
        if kind is not NDARRAY:
            raise ValueError("an array of another class than numpy.ndarray")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, is_fortran, content = state
        if not isinstance(kind, DType) or not isinstance(content, bytes):
            raise ValueError("an array without integers")
        sizes = isinstance(shape, tuple) and all(isinstance(size, int) and size >= 0 for size in shape)
        if not sizes or math.prod(shape) * kind.dtype.itemsize != len(content):
            raise ValueError(f"an array of shape {shape!r} with {len(content)} bytes")
        self.value = np.frombuffer(content, kind.dtype).reshape(shape, order="F" if is_fortran else "C")


def scalar(kind: object, content: object = b"") -> int:
    """Return the value of a numpy scalar in a pickle."""
    if not isinstance(kind, DType) or not isinstance(content, bytes) or len(content) != kind.dtype.itemsize:
        raise ValueError("a scalar that is not an integer")
    return int(np.frombuffer(content, kind.dtype)[0])


def encode(text: object, encoding: object = "latin1") -> bytes:
    """Return the bytes that a pickle of protocol 2 or older writes as text."""
    if not isinstance(text, str) or encoding != "latin1":
        raise ValueError("bytes in another encoding than latin1")
    return codecs.encode(text, "latin1")


NDARRAY = Known(ndarray)
KNOWN: dict[tuple[str, str], Known] = {
    **{(module, "_reconstruct"): Known(Array) for module in MODULES},
    **{(module, "scalar"): Known(scalar) for module in MODULES},
    ("numpy", "ndarray"): NDARRAY,
    ("numpy", "dtype"): Known(DType),
    ("_codecs", "encode"): Known(encode),
}


class RecordUnpickler(pickle.Unpickler):
    """An unpickler that knows the names in KNOWN and no other.

    It is the implementation in C, a tenth of the time of `restricted_pickle.RestrictedUnpickler`: a dataset has
    millions of records. A pickle can only call what `find_class` returns, and the objects in KNOWN refuse a state.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise ValueError(f"the name {module}.{name}, which no record of latents has")
        return KNOWN[module, name]

    def persistent_load(self, identifier: Any) -> Any:
        raise ValueError("a reference to an object outside of the pickle")


def read_record(content: bytes) -> dict[str, Any]:
    """Return the dict of a pickled record; arrays are numpy arrays, scalars are int.

    Raises ValueError, without running anything, for a pickle of anything but str, integers and integer arrays.
    """
    try:
        record = RecordUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # a damaged pickle raises any type of exception
        raise ValueError(f"is not a pickled record: {' '.join(str(error).split()) or type(error).__name__}") from None
    if not isinstance(record, dict) or not all(isinstance(key, str) for key in record):
        raise ValueError("is not a pickled record: it holds no dict of names")
    return {key: value.value if isinstance(value, Array) else value for key, value in record.items()}
