"""Objects that take the place of those in a pickle whose class is not loaded, and values of NumPy."""

import math
import re
from typing import Any

import numpy as np
import torch

from pixart.restricted_pickle import RefusedPickleError
from pixart.terminal import printable

MOST_LETTERS = 80  # of a name that is shown
RULE = "only tensors, containers and plain values are loaded"
NUMBER_DTYPES = r"b1|i[1248]|u[1248]|f[248]|c8|c16"  # NumPy's names of them


class Inert:
    """Object of a class that is not loaded: it keeps the arguments, the state and the items that a pickle gives it."""

    path = ""  # MODULE.NAME of the class that it stands for

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.arguments, self.named = arguments, named
        self.state: Any = None
        self.entries: dict[Any, Any] = {}
        self.elements: list[Any] = []

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, value: Any) -> None:
        self.elements.append(value)

    add = append

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Dtype(Inert):
    """A NumPy dtype, whose state has its byte order."""

    path = "numpy.dtype"

    def dtype(self) -> np.dtype[Any] | None:
        """Return the dtype if it is one of numbers."""
        name = self.arguments[0] if self.arguments else None
        if not isinstance(name, str) or not re.fullmatch(NUMBER_DTYPES, name):
            return None
        is_big_endian = isinstance(self.state, tuple) and len(self.state) > 1 and self.state[1] == ">"
        return np.dtype(name).newbyteorder(">" if is_big_endian else "<")


class Array(Inert):
    """A NumPy array, whose state is its version, shape, dtype, order and bytes."""

    path = "numpy.ndarray"

    def tensor(self) -> torch.Tensor | None:
        """Return the array as a tensor if it is one of numbers, and not damaged."""
        try:
            _, shape, dtype, is_fortran, data = self.state
            if (number_dtype := dtype.dtype()) is None:
                return None
            values = np.frombuffer(data, number_dtype).reshape(shape, order="F" if is_fortran else "C")
            return torch.from_numpy(values.astype(values.dtype.newbyteorder("="), order="C"))
        except (TypeError, ValueError, AttributeError):
            return None


class Scalar(Inert):
    """A NumPy scalar that is not a number."""

    path = "numpy.generic"


def scalar(dtype: Any, data: Any = b"") -> Any:
    """Return NumPy's scalar of that dtype and bytes as a number, or an inert object if it is none."""
    number_dtype = dtype.dtype() if isinstance(dtype, Dtype) else None
    if number_dtype is None or not isinstance(data, bytes) or len(data) != number_dtype.itemsize:
        return Scalar(dtype, data)
    return np.frombuffer(data, number_dtype)[0].item()


def array(*_: Any) -> Array:
    """Return an array that is still without its state."""
    return Array()


def encode(text: Any, encoding: Any = "latin1") -> bytes:
    """Return the bytes that a pickle of protocol 2 keeps as text."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise RefusedPickleError("bytes are damaged")
    return text.encode("latin1")


def default_dict(*_: Any) -> dict[Any, Any]:
    """Return a dictionary without the function that makes missing values."""
    return {}


def inert_class(path: str) -> type[Inert]:
    """Return a new class of inert objects that stands for the class or function MODULE.NAME."""
    return type(path.rpartition(".")[2], (Inert,), {"path": printable(path[:MOST_LETTERS])})


def as_value(value: Any) -> Any:
    """Return NumPy's arrays of numbers as tensors, inert dictionaries as dictionaries, and other values unchanged."""
    if isinstance(value, Array):
        tensor = value.tensor()
        return value if tensor is None else tensor
    if isinstance(value, Inert) and value.entries:
        return value.entries
    return value


def describe(value: Any) -> str:
    """Return what a value is: the path of a class that was not loaded, the size of a container, or the type."""
    if isinstance(value, Inert):
        return value.path or type(value).__name__
    if isinstance(value, torch.Tensor):
        return f"tensor of {math.prod(value.shape)} values"
    return type(value).__name__
