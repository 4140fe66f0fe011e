"""Listing of a local folder: each folder once, whatever links lead to it, and regular files only."""

import os
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

Identity = tuple[int, int]  # device and inode


def walk_local(root: str, left_out: Counter[str]) -> Iterator[tuple[str, int]]:
    """Yield the name and the size of each file below a folder, in any order, and count those left out by reason.

    Links to files and to other folders are followed. A link to a folder that is already read, or that contains the
    source, is left out, as are broken links, pipes, devices, and folders that may not be read. Hidden files are not
    counted. Raises OSError for a source that cannot be read.
    """
    visited: set[Identity] = set()
    containing = {_identity(parent.stat()) for parent in (Path(root).resolve(), *Path(root).resolve().parents)}
    links = [""]  # folders to read, by relative name; those behind links come after all others
    while links:
        folders = [links.pop(0)]
        if folders != [""] and (reason := _known(Path(root, folders[0]).stat(), visited, containing)):
            left_out[reason] += 1
            continue
        while folders:
            folder = folders.pop()
            identity = _identity(Path(root, folder).stat())
            if identity in visited:
                continue
            visited.add(identity)
            try:
                entries = os.scandir(f"{root}/{folder}")
            except PermissionError:
                if not folder:
                    raise
                left_out["folder that may not be read"] += 1
                continue
            with entries:
                for entry in entries:
                    name = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(name)
                        continue
                    try:
                        status = entry.stat()
                    except OSError:
                        left_out["broken link"] += 1
                        continue
                    if stat.S_ISDIR(status.st_mode):
                        links.append(name)
                    elif stat.S_ISREG(status.st_mode):
                        yield name, status.st_size
                    else:
                        left_out["pipe or device"] += 1
        links.sort()


def _known(status: os.stat_result, visited: set[Identity], containing: set[Identity]) -> str:
    """Return why a link to a folder is left out, "" if it is followed."""
    if _identity(status) in containing:
        return "link to a folder that contains it"
    return "link to a folder that is already read" if _identity(status) in visited else ""


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino
