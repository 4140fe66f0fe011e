"""Unpickler for `torch.load` that loads tensors and plain values, and replaces every other object by an inert one.

A checkpoint often has more than tensors: the arguments of the training script, paths, NumPy values, configurations.
Their classes are never imported and no function of theirs is called: an `Inert` object takes their place, and keeps
what the pickle gives it. What cannot be a mere value, such as a function that runs code, is refused by name.

This module has what `torch.load` requires of its `pickle_module`: `Unpickler` and `load`.
"""

import io
import math
import pickle
import re
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

RULE = "only tensors, containers and plain values are loaded"
ZIP = b"PK\x03\x04"  # the start of a zip archive, by which torch.load decides
TORCHSCRIPT = "constants.pkl"  # an entry that only archives of TorchScript have
PythonUnpickler: Any = pickle._Unpickler
DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
# Modules whose functions run code, and of each of them the classes that are mere values.
PROCESSES = (
    *("asyncio", "code", "codeop", "commands", "ctypes", "importlib", "marshal", "multiprocessing", "nt", "os"),
    *("pickle", "posix", "pty", "runpy", "shutil", "signal", "socket", "subprocess", "sys", "threading", "timeit"),
    "webbrowser",
)
NUMBERS_AND_CONTAINERS = frozenset(
    (
        *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range"),
        *("set", "slice", "str", "tuple"),
    )
)
STREAMS = frozenset({"BytesIO", "StringIO"})
REFUSED_MODULES: dict[str, frozenset[str]] = {
    **dict.fromkeys(PROCESSES, frozenset[str]()),
    **dict.fromkeys(("builtins", "__builtin__"), NUMBERS_AND_CONTAINERS),
    **dict.fromkeys(("io", "_io"), STREAMS),
}
NUMBER_DTYPES = r"b1|i[1248]|u[1248]|f[248]|c8|c16"  # NumPy's names of them


class RefusedPickleError(pickle.UnpicklingError):
    """A pickle has something that is not loaded, which the message names."""


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
            values = np.frombuffer(data, dtype.dtype()).reshape(shape, order="F" if is_fortran else "C")
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


FUNCTIONS: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "collections.defaultdict": default_dict,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch.nn.parameter.Parameter": torch.nn.Parameter,
    "torch._utils._rebuild_tensor": torch._utils._rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,
    "numpy.dtype": Dtype,
    "_codecs.encode": encode,
    "builtins.set": set,
    "__builtin__.set": set,
    "builtins.frozenset": frozenset,
    "__builtin__.frozenset": frozenset,
    **{f"{module}.multiarray.scalar": scalar for module in ("numpy.core", "numpy._core")},
    **{f"{module}.multiarray._reconstruct": array for module in ("numpy.core", "numpy._core")},
}
CALLED = frozenset(FUNCTIONS.values())


class Unpickler(PythonUnpickler):
    """Unpickler that calls nothing but FUNCTIONS and the classes of inert objects.

    It is the implementation in Python, whose operations can be overridden. Raises RefusedPickleError, which names the
    cause, for anything that is refused.
    """

    dispatch = PythonUnpickler.dispatch.copy()

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if path in FUNCTIONS:
            return FUNCTIONS[path]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        allowed = REFUSED_MODULES.get(module.partition(".")[0])
        if allowed is not None and name not in allowed:
            raise RefusedPickleError(f"it refers to {path}, and {RULE}")
        return type(name.rpartition(".")[2], (Inert,), {"path": path})

    def call(self, function: Any, arguments: Any, named: Mapping[str, Any]) -> Any:
        """Return an allowed function's value. Raises RefusedPickleError for any other function."""
        is_inert = isinstance(function, type) and issubclass(function, Inert)
        if not is_inert and not any(function is called for called in CALLED):
            raise RefusedPickleError(f"it calls {str(function)[:80]}, and {RULE}")
        return function(*arguments, **named)

    def load_reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], arguments, {})

    def load_newobj_ex(self) -> None:
        named, arguments = self.stack.pop(), self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], arguments, named)

    def _instantiate(self, function: Any, arguments: Any) -> None:
        self.append(self.call(function, arguments, {}))

    def load_build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Inert):
            target.__setstate__(state)
        elif not isinstance(target, OrderedDict | torch.Tensor | dict):  # attributes of these are not needed
            raise RefusedPickleError(f"it sets attributes of {type(target).__name__}, which is not allowed")

    def load_append(self) -> None:
        value = self.stack.pop()
        self.extend([value])

    def load_appends(self) -> None:
        self.extend(self.pop_mark())

    def extend(self, values: list[Any]) -> None:
        """Append to the list, or to the inert object, on top of the stack. Raises RefusedPickleError for others."""
        target = self.stack[-1]
        if not isinstance(target, list | Inert):
            raise RefusedPickleError(f"it appends to {type(target).__name__}, which is not allowed")
        for value in values:
            target.append(value)

    def load_extension(self) -> None:
        raise RefusedPickleError(f"it refers to objects of a registry, and {RULE}")

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_reduce
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.APPEND[0]] = load_append
    dispatch[pickle.APPENDS[0]] = load_appends
    for operation in (pickle.EXT1, pickle.EXT2, pickle.EXT4):
        dispatch[operation[0]] = load_extension


def load(file: Any, **options: Any) -> Any:
    """Return the object that a file holds. Raises RefusedPickleError if something in it is refused."""
    return Unpickler(file, **options).load()


def load_archive(source: Path | io.BytesIO, *, mmap: bool = False) -> Any:
    """Return the object of an archive that `torch.save` wrote, with inert objects in place of unknown classes.

    Raises RefusedPickleError if something in it is refused, or if it is no such archive.
    """
    file = io.BytesIO(source.getvalue()[:4]) if isinstance(source, io.BytesIO) else source.open("rb")
    with file:
        if file.read(4) != ZIP:
            raise RefusedPickleError("it is not a zip archive")
    if torch._C.PyTorchFileReader(source if isinstance(source, io.BytesIO) else str(source)).has_record(TORCHSCRIPT):
        raise RefusedPickleError("it is a TorchScript archive, whose code is not loaded")
    if isinstance(source, io.BytesIO):
        source.seek(0)
    return torch.load(source, map_location="cpu", weights_only=False, pickle_module=sys.modules[__name__], mmap=mmap)


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
