import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

HANG = """
import threading, time
from pixart.training.watchdog import HangWatchdog
watchdog = HangWatchdog(0.01).__enter__()
def wait_for_other_ranks(): time.sleep(2)
threading.Thread(target=wait_for_other_ranks).start()
for _ in range(20):
    time.sleep(0.05)
    watchdog.step_ended()
print("no traceback so far", flush=True)
time.sleep(0.9)
watchdog.__exit__()
"""


def test_a_hang_prints_the_stacks_of_all_threads():
    process = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, check=True)
    assert "Timeout" in process.stderr
    assert "wait_for_other_ranks" in process.stderr
    assert "line 11 in <module>" in process.stderr  # after the last step, not before
    assert "line 9 in <module>" not in process.stderr
