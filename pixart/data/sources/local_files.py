"""Listing of a local folder: each folder once, whatever links lead to it, and regular files only."""

import os
import stat
from collections import Counter
from pathlib import Path

Identity = tuple[int, int]  # device and inode


def walk_local(root: str) -> tuple[dict[str, int], Counter[str]]:
    """Return the size of each file below a folder by its relative name, and the number of files left out by reason.

    Links to files and to other folders are followed. A link to a folder that is already read, or that contains the
    source, is left out, as are broken links, pipes and devices. Hidden files are not counted. Raises OSError for a
    folder that cannot be read.
    """
    sizes: dict[str, int] = {}
    left_out: Counter[str] = Counter()
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
            with os.scandir(f"{root}/{folder}") as entries:
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
                        sizes[name] = status.st_size or -1
                    else:
                        left_out["pipe or device"] += 1
        links.sort()
    return dict(sorted(sizes.items())), left_out


def _known(status: os.stat_result, visited: set[Identity], containing: set[Identity]) -> str:
    """Return why a link to a folder is left out, "" if it is followed."""
    if _identity(status) in containing:
        return "link to a folder that contains it"
    return "link to a folder that is already read" if _identity(status) in visited else ""


def _identity(status: os.stat_result) -> Identity:
    return status.st_dev, status.st_ino
