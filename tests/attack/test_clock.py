"""Jobs while the clock of the machine jumps by hours and years, in both directions: the same bits, and no hang.

libfaketime gives a process the wall clock that a file says; the times of files and the monotonic clock stay. Debian's
package faketime has it.
"""

import os
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import pytest

from pixart.config.recipe import Recipe
from tests.attack.campaign import campaign, is_long
from tests.attack.killed_jobs import JOBS, compare, reset, undisturbed

pytestmark = pytest.mark.slow
LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
JUMPS = ("+0", "-400d", "+3h", "+400d", "-1h")
JUMP_SECONDS = 0.3  # between two jumps
END_SECONDS = 120
NAMES = [name for name, job in JOBS.items() if is_long() or name in ("caption", "latents", "audit")]


def run_with_jumps(name: str, folder: Path, clock: Path) -> tuple[int | None, str]:
    """Run a job while the clock jumps; return its exit code, None for a hang, and its errors."""
    clock.write_text(JUMPS[0])
    assert LIBRARY
    environment = {
        **os.environ,
        "LD_PRELOAD": str(LIBRARY),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
        "OMP_NUM_THREADS": "1",
    }
    code = f"from tests.attack.killed_jobs import JOBS; JOBS[{name!r}].function({str(folder)!r})"
    with clock.with_suffix(".log").open("w+") as log:
        process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=log, stderr=log)
        jumps = cycle(JUMPS)
        for _ in range(int(END_SECONDS / JUMP_SECONDS)):
            new = clock.with_suffix(".new")
            new.write_text(next(jumps))
            new.replace(clock)
            try:
                process.wait(JUMP_SECONDS)
                break
            except subprocess.TimeoutExpired:
                pass
        else:
            process.kill()
            process.wait()
            return None, ""
        log.seek(0)
        return process.returncode, log.read()[-2000:]


@pytest.mark.skipif(LIBRARY is None, reason="needs libfaketime: apt-get install faketime")
@pytest.mark.parametrize("name", NAMES)
def test_jumps_of_the_clock_change_no_results(name, small_recipe: Recipe, tmp_path, record_property):
    attack = campaign(f"clock jumps in {name}", short=1, long=3)
    job = JOBS[name]
    template, folder, expected = undisturbed(job, small_recipe, tmp_path, num_ranks=1)
    for _ in range(attack.tries):
        reset(template, folder)
        attack.figures.tries += 1
        code, errors = run_with_jumps(name, folder, tmp_path / "clock")
        if code is None:
            attack.figures.hangs += 1
            attack.failures.append(f"{name}: did not end in {END_SECONDS} s")
        elif code:
            attack.figures.tracebacks += 1
            attack.failures.append(f"{name}: exit code {code}: {errors}")
        else:
            compare(attack, name, job, folder, expected)
    attack.finish(record_property)
