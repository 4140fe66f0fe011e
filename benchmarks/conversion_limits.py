"""Measure time and peak memory of converting a full-size checkpoint, relative to copying the file on the same disk.

`python -m benchmarks.conversion_limits FOLDER` writes about 30 GB to FOLDER. With `--memory BYTES` the conversion also
runs in a cgroup with that memory limit, which requires root and a mounted cgroup v1 memory controller.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks import measure
from pixart.config.model import ModelConfig
from pixart.model.dit import DiT, parameter_groups

CGROUP = Path("/sys/fs/cgroup/memory/conversion-limits")
COPIES = 2  # timed copies before each conversion, and the same number after it
IMAGES = 1  # per batch; calibration uses one batch and verification four
METHOD = (
    "The conversion time is relative to the median time of `cp` and fsync of the source on the same disk, before and "
    "after the conversion. Calibration uses one batch of one small latent and verification four batches, so that the "
    "size of the weights determines the time of a forward pass. The hash of the source and the comparison of every "
    "copied tensor run in parallel to the steps after writing; their additional time is listed as `comparing`."
)
CALIBRATION, FIT = "calibrating", "converting"  # names of steps in the conversion's log


def write_checkpoint(path: Path) -> int:
    """Write a full-size checkpoint of random tensors in the original training's format; return its parameter count."""
    sizes = {name: getattr(ModelConfig(), name) for name in ModelConfig.__dataclass_fields__}
    model = DiT(**{**sizes, "base_image_size": 8})
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in model.state_dict().items():
        is_parameter = name in dict(model.named_parameters())
        state[name] = 0.02 * torch.randn(tensor.shape, generator=generator) if is_parameter else tensor
        if name.endswith("norm.weight"):
            state[name] += 1
    names = [name for group in parameter_groups(model) for name in group]
    moments = {
        index: {"step": torch.tensor(8.0), "exp_avg": 1e-3 * state[name], "exp_avg_sq": state[name].square()}
        for index, name in enumerate(names)
    }
    average = {name: 1.001 * tensor for name, tensor in state.items()}
    torch.save({"model": state, "model_ema": average, "optimizer": {"state": moments}, "step": 7}, path)
    return sum(state[name].numel() for name in names)


def copy_seconds(path: Path) -> float:
    """Return the time in seconds of `cp` and fsync of a file; the copy is deleted."""
    begun = time.perf_counter()
    copy = path.with_suffix(".copy")
    subprocess.run(["cp", str(path), str(copy)], check=True)
    with copy.open("rb") as file:
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begun
    copy.unlink()
    return seconds


def convert(path: Path, stage: int, memory: int | None = None) -> tuple[dict[str, float], float]:
    """Convert a checkpoint in a subprocess; return the seconds of each step and the peak anonymous memory in bytes.

    `memory` is the limit of the subprocess's cgroup in bytes; None: no limit.
    """
    shutil.rmtree(path.with_suffix(".fp8"), ignore_errors=True)
    words = [sys.executable, "-m", "conversion.to_fp8", str(path), "--text-dim", "2048", "--base-latent-size", "8"]
    words += ["--num-batches", "1", "--batch-size", str(IMAGES), "--keep-bf16", "linear_out", "--stage", str(stage)]
    log = path.with_suffix(".log")

    def enter() -> None:
        (CGROUP / "cgroup.procs").write_text(str(os.getpid()))

    with log.open("w") as file:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=file, preexec_fn=enter if memory else None)
        peak = 0.0
        while process.poll() is None:
            for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
                if line.startswith("RssAnon"):
                    peak = max(peak, 1024 * float(line.split()[1]))
            time.sleep(0.05)
    logged = log.read_text()
    assert process.returncode in (0, 3), logged
    seconds: dict[str, float] = {}
    for line in logged.splitlines():
        if step := re.fullmatch(r"(\w+).*: ([0-9.]+) s", line):
            seconds[step[1]] = seconds.get(step[1], 0) + float(step[2])
    return seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--memory",
        type=int,
        metavar="BYTES",
        help="Memory limit of a further conversion (default: no further conversion).",
    )
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / "large.pt"
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:  # frees the memory when it exits
        parameters = process.submit(write_checkpoint, path).result()
    subprocess.run(["sync"], check=True)
    lines = [f"{parameters / 1e6:.0f} M parameters, a file of {path.stat().st_size / 1e9:.1f} GB.", "", METHOD]
    for stage in (1, 2):
        before = [copy_seconds(path) for _ in range(COPIES)]
        seconds, peak = convert(path, stage)
        copies = before + [copy_seconds(path) for _ in range(COPIES)]
        written = sum(file.stat().st_size for file in path.with_suffix(".fp8").rglob("*") if file.is_file())
        counted = {"total without calibration": sum(value for name, value in seconds.items() if name != CALIBRATION)}
        if stage == 2:
            counted["total without calibration and stage-2 fit"] = counted["total without calibration"] - seconds[FIT]
        median = statistics.median(copies)
        lines += [
            "",
            f"Stage {stage}: {written / 1e9:.1f} GB written. `cp` and fsync of the source: "
            f"{', '.join(f'{copy:.1f}' for copy in copies)} s.",
            "",
            "| step | seconds |",
            "|---|---|",
            *(f"| {name} | {value:.1f} |" for name, value in seconds.items() if value >= 0.05),
            *(f"| {name} | {value:.1f} ({value / median:.2f} of `cp` + fsync) |" for name, value in counted.items()),
            "",
            f"Peak anonymous memory: {peak / 1e9:.2f} GB; the model in BF16 has {2 * parameters / 1e9:.2f} GB.",
        ]
        print("\n".join(lines), flush=True)
    if options.memory:
        CGROUP.mkdir(exist_ok=True)
        (CGROUP / "memory.limit_in_bytes").write_text(str(options.memory))
        begun = time.perf_counter()
        convert(path, 1, options.memory)
        lines += ["", f"With a memory limit of {options.memory / 1e9:.2f} GB: {time.perf_counter() - begun:.0f} s."]
    measure.write("conversion-limits", ["# Conversion of a full-size checkpoint, on two CPU cores", "", *lines])
    print("\n".join(lines))


if __name__ == "__main__":
    main()
