import subprocess
import sys

STALL = """
import threading, time
from pixart.training.watchdog import Watch
watch = Watch(0.01).__enter__()
def waits_for_the_others(): time.sleep(2)
threading.Thread(target=waits_for_the_others).start()
for _ in range(20):
    time.sleep(0.05)
    watch.step_ended()
print("no word so far", flush=True)
time.sleep(0.9)
watch.__exit__()
"""


def test_a_stall_prints_every_thread():
    done = subprocess.run([sys.executable, "-c", STALL], capture_output=True, text=True, check=True)
    assert "Timeout" in done.stderr
    assert "waits_for_the_others" in done.stderr
    assert "line 11 in <module>" in done.stderr  # where the steps have stopped, not before
    assert "line 9 in <module>" not in done.stderr
