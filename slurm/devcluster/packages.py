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
    """Install packages, whose names are separated by spaces and given by program, where the program is missing.

    Processes that install at the same time take turns. Raises ValueError if a package cannot be installed.
    """
    if not missing(packages):
        return
    with LOCK.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        needed = missing(packages)
        if not needed:
            return
        if not shutil.which("apt-get"):
            raise ValueError(f"missing Debian packages: {', '.join(needed)}; there is no apt-get to install them with")
        print(f"installing {' '.join(needed)}", flush=True)
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for words in (["update"], ["install", "-y", "--no-install-recommends", *needed]):
            done = subprocess.run(["apt-get", *words], capture_output=True, text=True, env=environment)
        if done.returncode:
            raise ValueError(f"apt-get could not install {' '.join(needed)}: {done.stderr.strip()}")


def missing(packages: Mapping[str, str]) -> list[str]:
    """Return the names of the packages whose program is missing."""
    texts = [names for program, names in packages.items() if not shutil.which(program, path=PATH)]
    return [name for names in texts for name in names.split()]
