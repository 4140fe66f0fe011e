"""The init job ends with the launcher that has started it."""

import os
import subprocess
import sys

from jobs.submission.datasets import has_ended

WATCHING = """
import sys, time
from jobs.submission import datasets
datasets.WATCH_SECONDS = datasets.GRACE_SECONDS = 0.05
datasets.while_alive(int(sys.argv[1]), lambda: time.sleep(60))
"""


def test_an_init_job_ends_with_its_launcher():
    launcher = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    job = subprocess.Popen([sys.executable, "-c", WATCHING, str(launcher.pid)])
    try:
        launcher.kill()
        assert job.wait(30) != 0
    finally:
        job.kill()
        launcher.communicate()
    assert has_ended(launcher.pid)
    assert not has_ended(os.getpid())
