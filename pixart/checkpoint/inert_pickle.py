"""Unpickler for `torch.load` that loads tensors and plain values, and replaces every other object by an inert one.

A checkpoint often has more than tensors: the arguments of the training script, paths, NumPy values, configurations.
Their classes are never imported and no function of theirs is called: an `Inert` object takes their place, and keeps
what the pickle gives it. What cannot be a mere value, such as a function that runs code, is refused by name.

This module has what `torch.load` requires of its `pickle_module`: `Unpickler` and `load`.
"""

import io
import sys
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pixart.checkpoint.inert import (
    MOST_LETTERS,
    RULE,
    Dtype,
    Inert,
    array,
    default_dict,
    encode,
    inert_class,
    scalar,
)
from pixart.restricted_pickle import RefusedPickleError, RestrictedUnpickler
from pixart.terminal import printable

ZIP = b"PK\x03\x04"  # the start of a zip archive, by which torch.load decides
TORCHSCRIPT = "constants.pkl"  # an entry that only archives of TorchScript have
DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
# Functions that run code, by module; all of a module that is not listed with its functions.
REFUSED_MODULES = frozenset(
    (
        *("code", "codeop", "commands", "ctypes", "importlib", "marshal", "nt", "os", "pickle", "posix", "pty"),
        *("runpy", "shutil", "socket", "subprocess", "sys", "timeit", "webbrowser"),
    )
)
EXECUTING = frozenset(
    (
        *("__import__", "apply", "breakpoint", "compile", "delattr", "eval", "exec", "execfile", "file", "globals"),
        *("getattr", "input", "locals", "open", "setattr", "vars"),
    )
)
REFUSED_FUNCTIONS = {
    **dict.fromkeys(("builtins", "__builtin__"), EXECUTING),
    **dict.fromkeys(("io", "_io"), frozenset(("FileIO", "open", "open_code"))),
}


def inert_attribute(*arguments: Any) -> type[Inert]:
    """Return the class that stands for an attribute of another, as protocol 2 has nested classes and bound methods."""
    match arguments:
        case [type() as owner, str() as name] if issubclass(owner, Inert):
            return inert_class(f"{owner.path}.{name}")
        case [Inert() as owner, str() as name]:
            return inert_class(f"{owner.path}.{name}")
    raise RefusedPickleError(f"it refers to builtins.getattr, and {RULE}")


def is_method(path: str) -> bool:
    """Return whether a path is MODULE.CLASS.NAME of what by its name is a method, and no nested class."""
    *_, owner, name = ["", *path.split(".")]
    return owner.lstrip("_")[:1].isupper() and not name.lstrip("_")[:1].isupper()


ATTRIBUTE = ("builtins.getattr", "__builtin__.getattr")
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
CALLED = frozenset((*FUNCTIONS.values(), inert_attribute))


class Unpickler(RestrictedUnpickler):
    """Unpickler that calls nothing but FUNCTIONS and the classes of inert objects.

    Raises RefusedPickleError, which names the cause, for anything that is refused.
    """

    appendable = (list, Inert)

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if path in FUNCTIONS:
            return FUNCTIONS[path]
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if path in ATTRIBUTE:
            return inert_attribute
        if module.partition(".")[0] in REFUSED_MODULES or name in REFUSED_FUNCTIONS.get(module, ()):
            raise RefusedPickleError(f"it refers to {printable(path[:MOST_LETTERS])}, and {RULE}")
        return inert_class(path)

    def call(self, function: Any, arguments: Any, named: Mapping[str, Any]) -> Any:
        """Return an allowed function's value. Raises RefusedPickleError for any other function."""
        is_inert = isinstance(function, type) and issubclass(function, Inert)
        if is_inert and is_method(function.path):
            raise RefusedPickleError(f"it refers to {function.path}, and {RULE}")
        if not is_inert and not any(function is called for called in CALLED):
            raise RefusedPickleError(f"it calls {str(function)[:80]}, and {RULE}")
        return function(*arguments, **named)

    def set_state(self, target: Any, state: Any) -> None:
        if isinstance(target, Inert):
            target.__setstate__(state)
        elif not isinstance(target, OrderedDict | torch.Tensor | dict):  # attributes of these are not needed
            super().set_state(target, state)


def load(file: Any, **options: Any) -> Any:
    """Return the object that a file holds. Raises RefusedPickleError if something in it is refused."""
    return Unpickler(file, **options).load()


def load_archive(source: Path | io.BytesIO, *, mmap: bool = False) -> Any:
    """Return the object of an archive that `torch.save` wrote, with inert objects in place of unknown classes.

    Raises RefusedPickleError if something in it is refused, or if it is no such archive.
    """
    if isinstance(source, io.BytesIO):
        head = source.getvalue()[: len(ZIP)]
    else:
        with source.open("rb") as file:
            head = file.read(len(ZIP))
    if head != ZIP:
        raise RefusedPickleError("it is not a zip archive")
    stream = io.BytesIO(source.getvalue()) if isinstance(source, io.BytesIO) else str(source)
    if torch._C.PyTorchFileReader(stream).has_record(TORCHSCRIPT):  # type: ignore[attr-defined]
        raise RefusedPickleError("it is a TorchScript archive, whose code is not loaded")
    if isinstance(source, io.BytesIO):
        source.seek(0)
    return torch.load(source, map_location="cpu", weights_only=False, pickle_module=sys.modules[__name__], mmap=mmap)
