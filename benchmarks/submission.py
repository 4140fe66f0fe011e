"""Benchmark the submission of a job array by the launcher against sbatch, alternating, on a local Slurm cluster.

`python -m benchmarks.submission` starts the cluster, which requires root, submits arrays of 256 elements, prints a
table and writes it to `benchmarks/results/`.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import measure
from slurm.devcluster import lifecycle

REPEATS = 7
ARRAY = "0-255"


def seconds(*words: str, folder: Path) -> float:
    """Return the wall-clock time in seconds of a command that runs in `folder`."""
    begun = time.perf_counter()
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - begun


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cluster = lifecycle.up(folder / "dev")
        os.environ.update(cluster.environment)
        os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
        launch = (sys.executable, "-m", "jobs.launch")
        (folder / "script.sh").write_text("#!/bin/sh\nsleep 60\n")
        measured: dict[str, list[float]] = {"bare sbatch": [], "launcher": []}
        try:
            seconds(*launch, "caption", "--array", "0", folder=folder)  # creates the dataset's manifest
            for _ in range(REPEATS):
                measured["bare sbatch"].append(seconds("sbatch", f"--array={ARRAY}", "script.sh", folder=folder))
                subprocess.run(["scancel", "--me"], check=True)
                measured["launcher"].append(seconds(*launch, "caption", "--array", ARRAY, folder=folder))
                subprocess.run(["scancel", "--me"], check=True)
                time.sleep(2)
        finally:
            lifecycle.down(folder / "dev")
    lines = ["| submission of 256 elements | median, s | fastest, s |", "|---|---|---|"]
    lines += [f"| {method} | {statistics.median(times):.2f} | {min(times):.2f} |" for method, times in measured.items()]
    gap = statistics.median(measured["launcher"]) - statistics.median(measured["bare sbatch"])
    lines.append(f"\nThe launcher takes {gap:.2f} s longer, including the start of Python and the code snapshot.")
    measure.write("submission", ["# Submission of an array, on two CPU cores", "", *lines])
    print("\n".join(lines))


if __name__ == "__main__":
    main()
