"""Install the Debian packages that the tests use, before any test runs: `python -m tests.support.debian_packages`.

Each test also installs the packages that it needs. That is too late for other tests running at the same time: whether
Slurm is installed decides where their jobs run.
"""

import os
import shutil

from slurm.devcluster import lifecycle, packages
from tests.support import browser_fixture

FAKETIME = {"faketime": "faketime"}  # of tests/attack/test_clock.py

if __name__ == "__main__" and shutil.which("apt-get") and os.geteuid() == 0:
    packages.install({**lifecycle.PACKAGES, **lifecycle.ACCOUNTING_PACKAGES, **browser_fixture.PACKAGES, **FAKETIME})
