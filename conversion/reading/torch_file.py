"""Loading of files that `torch.save` wrote, without running any code that they name."""

import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from conversion.reading.pickle_format import is_pickle_format
from pixart.checkpoint import inert_pickle
from pixart.checkpoint.inert import RefusedPickleError
from pixart.data.torch_archive import check_archive

KIND = "PyTorch checkpoint"


def load(path: Path) -> Any:
    """Load a file, memory-mapped where its format allows it, with inert objects in place of unknown classes.

    Raises ValueError, which names the cause, if the file is damaged or cannot be loaded without running code.
    """
    is_archive = check_format(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except Exception:  # torch.load raises many types of exception; the unpickler below reads more, or finds the cause
        return load_inert(path, is_archive)


def load_inert(path: Path, is_archive: bool) -> Any:
    """Load a file with `inert_pickle`, which imports nothing and calls only what rebuilds tensors and numbers."""
    try:
        if is_archive:
            return inert_pickle.load_archive(path, mmap=True)
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=inert_pickle)
    except RefusedPickleError as error:
        raise ValueError(f"{path} cannot be read: {error}; save the state dictionaries with plain tensors") from error
    except Exception as error:
        raise ValueError(f"{path} cannot be read: it is not a {KIND}, or it is truncated or damaged") from error


def check_format(path: Path) -> bool:
    """Return whether a file is a zip archive, and not of the format before torch 1.6.

    Raises ValueError, which names the cause, if it has neither format.
    """
    with path.open("rb") as file:
        head = file.read(2)
    if head.startswith(b"PK"):
        if any(name.rpartition("/")[2] == inert_pickle.TORCHSCRIPT for name in entry_names(path)):
            raise ValueError(f"{path} cannot be read: it is a TorchScript archive; save the model's state_dict()")
        check_archive(path, KIND)
        return True
    if tarfile.is_tarfile(path):
        raise ValueError(
            f"{path} cannot be read: it is a tar archive, as torch.save wrote before version 0.1.10; load it with that "
            "version and save it again"
        )
    if not is_pickle_format(path):
        cause = "a pickle of another program and" if is_pickle(head) else "truncated, or"
        raise ValueError(f"{path} cannot be read: it is {cause} not a {KIND}; write the checkpoint with torch.save")
    return False


def entry_names(path: Path) -> list[str]:
    """Return the names of the entries of a zip archive, or none if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
        return []


def is_pickle(head: bytes) -> bool:
    """Return whether a file that starts with `head` is a pickle of protocol 2 or later."""
    return head[:1] == pickle.PROTO and len(head) > 1 and 2 <= head[1] <= pickle.HIGHEST_PROTOCOL
