"""Atomic files and folders, and locks: a reader sees the complete content or none, also after a crash of the machine.

The content is written under a temporary name, flushed to disk and renamed. A temporary name names its process,
`.NAME.HOST-PID-RANDOM.partial`: what a killed process left is removed by the next writer of the same name, and what a
living one writes is not. A process of another host counts as dead after ABANDONED_SECONDS without a change.
"""

import errno
import glob
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)
SUFFIX = ".partial"
OWNER = re.compile(r"\.(?P<name>.+)\.(?P<host>[^.]+)-(?P<pid>[0-9]+)-[0-9a-f]{8}\.partial")
ABANDONED_SECONDS = 7 * 24 * 3600
NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


def write_atomically(target: Path, content: str | bytes) -> None:
    """Write a file, in a folder that is created if it does not exist."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as temporary:
        write_file(temporary, content.encode() if isinstance(content, str) else content)


def copy_atomically(source: Path, target: Path) -> None:
    """Copy a file of any size, in an existing folder."""
    with atomic_path(target) as temporary, source.open("rb") as read, temporary.open("wb") as written:
        shutil.copyfileobj(read, written)
        written.flush()
        os.fsync(written.fileno())


def write_file(path: Path, content: bytes) -> None:
    """Write a file and flush it to disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Provide a temporary path, for a file that the context writes and flushes, and rename it to `target`."""
    remove_leftovers(target)
    temporary = temporary_path(target)
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """Provide a temporary folder that is renamed to `directory`, replacing an existing one, if no error occurs."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(directory)
    partial = temporary_path(directory)
    partial.mkdir()
    try:
        yield partial
        if directory.exists():
            old = temporary_path(directory)
            directory.replace(old)
            partial.replace(directory)
            shutil.rmtree(old, ignore_errors=True)  # NFS may keep open files; a later writer removes them
        else:
            partial.replace(directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def file_lock(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold an exclusive lock on a file, which is created if it does not exist, and yield whether it is held.

    Without `wait`, it is not held if another process holds it. A file system without locks is a warning: there, the
    lock counts as held. Raises OSError if this user may not write the file.
    """
    from filelock import FileLock, Timeout  # imports asyncio, which the launcher's start would wait for

    lock = FileLock(path, timeout=-1 if wait else 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    held = True
    try:
        lock.acquire()
    except Timeout:
        held = False
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
            raise
        logger.warning("%s: the file system has no locks (%s); do not run the same job twice at once", path, error)
    try:
        yield held
    finally:
        lock.release()


def temporary_path(target: Path) -> Path:
    """Return a new temporary name beside `target` that names this process."""
    return target.with_name(f".{target.name}.{host()}-{os.getpid()}-{secrets.token_hex(4)}{SUFFIX}")


def remove_leftovers(target: Path) -> list[Path]:
    """Remove the temporary files and folders of `target` whose process has ended, and return them."""
    removed = []
    for path in target.parent.glob(f".{glob.escape(target.name)}.*{SUFFIX}"):
        owner = OWNER.fullmatch(path.name)
        if owner is None or owner["name"] != target.name or is_alive(path, owner["host"], int(owner["pid"])):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()
        removed.append(path)
    return removed


def is_alive(path: Path, host_name: str, pid: int) -> bool:
    """Return whether the process that owns a temporary path may still run."""
    if host_name != host():
        try:
            return time.time() - path.stat().st_mtime < ABANDONED_SECONDS
        except OSError:  # removed by another process
            return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # a process of another user
        return True
    return True


def host() -> str:
    """Return the name of this machine, without characters that separate the parts of a temporary name."""
    return re.sub(r"[^A-Za-z0-9_]", "_", socket.gethostname())
