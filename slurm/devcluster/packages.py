"""Installation of the Debian packages of missing programs."""

import fcntl
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from slurm.devcluster.cluster import PATH

LOCK = Path(tempfile.gettempdir()) / "pixart-apt-get.lock"


def install(packages: Mapping[str, str]) -> None:
    """Install the packages of missing programs; `packages` maps a program to package names separated by spaces.

    A lock serializes processes that install at the same time. Raises ValueError if a package cannot be installed.
    """
    if not missing(packages):
        return
    with LOCK.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        needed = missing(packages)
        if not needed:
            return
        if not shutil.which("apt-get"):
            raise ValueError(
                f"Debian packages {', '.join(needed)}: not installed; install them, since this system has no apt-get"
            )
        print(f"installing {' '.join(needed)}", flush=True)
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "-y", "--no-install-recommends", *needed]):
            process = subprocess.run(["apt-get", *words], capture_output=True, text=True, env=environment)
        if process.returncode:
            raise ValueError(f"apt-get: cannot install {' '.join(needed)}; {' '.join(process.stderr.split())}")


def missing(packages: Mapping[str, str]) -> list[str]:
    """Return the names of the packages whose program is missing."""
    texts = [names for program, names in packages.items() if not shutil.which(program, path=PATH)]
    return [name for names in texts for name in names.split()]
