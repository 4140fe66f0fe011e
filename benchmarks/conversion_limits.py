"""Time and memory of converting a checkpoint of the real run's size, against a copy of its bytes on the same disk.

`python benchmarks/conversion_limits.py FOLDER` writes about 30 GB there; with `--memory BYTES`, as root where the
memory controller of cgroups is mounted, the conversion also runs within that much memory. Latents are small and few:
what is measured is everything but calibration and verification, whose time is that of the model's passes.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

from pixart.config import ModelConfig
from pixart.model.dit import DiT, parameter_groups

CGROUP = Path("/sys/fs/cgroup/memory/conversion-limits")
MEASURED = ("calibrating", "verifying")  # steps of the report that are passes of the model


def write_checkpoint(path: Path) -> int:
    """The original training's file with random content -> parameters of the model."""
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
    begun = time.perf_counter()
    copy = path.with_suffix(".copy")
    subprocess.run(["cp", str(path), str(copy)], check=True)
    with copy.open("rb") as file:
        os.fsync(file.fileno())
    found = time.perf_counter() - begun
    copy.unlink()
    return found


def convert(path: Path, memory: int | None = None) -> tuple[dict[str, float], float]:
    """Seconds of each step, and the peak of memory that is no mapped file, in bytes."""
    words = [sys.executable, "-m", "conversion.to_fp8", str(path), "--overwrite", "--text-dim", "2048"]
    words += ["--base-image-size", "8", "--batches", "1", "--batch", "2", "--keep-bf16", "linear_out"]

    def enter() -> None:
        (CGROUP / "cgroup.procs").write_text(str(os.getpid()))

    process = subprocess.Popen(
        words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=enter if memory else None
    )
    peak = 0.0
    while process.poll() is None:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                peak = max(peak, 1024 * float(line.split()[1]))
        time.sleep(0.05)
    assert process.stderr
    told = process.stderr.read()
    assert process.returncode in (0, 3), told
    steps = [re.fullmatch(r"(\w+).*: ([0-9.]+) s", line) for line in told.splitlines()]
    return {step[1]: float(step[2]) for step in steps if step}, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--memory", type=int, help="bytes")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    path = options.folder / "large.pt"
    parameters = write_checkpoint(path)
    subprocess.run(["sync"], check=True)
    before, (seconds, peak), after = copy_seconds(path), convert(path), copy_seconds(path)
    own = sum(value for name, value in seconds.items() if name not in MEASURED)
    copied = (before + after) / 2
    lines = [
        f"{parameters / 1e6:.0f} M parameters, a file of {path.stat().st_size / 1e9:.1f} GB, "
        f"copied and synced in {before:.0f} s before and {after:.0f} s after.",
        "",
        "| step | seconds |",
        "|---|---|",
        *(f"| {name} | {value:.1f} |" for name, value in seconds.items()),
        f"| all but calibrating and verifying | {own:.1f} ({own / copied:.2f} of the copy) |",
        "",
        f"Peak of memory that is no mapped file: {peak / 1e9:.2f} GB; the model in BF16 has "
        f"{2 * parameters / 1e9:.2f} GB.",
    ]
    if options.memory:
        CGROUP.mkdir(exist_ok=True)
        (CGROUP / "memory.limit_in_bytes").write_text(str(options.memory))
        begun = time.perf_counter()
        convert(path, options.memory)
        lines += ["", f"Within {options.memory / 1e9:.2f} GB of memory: {time.perf_counter() - begun:.0f} s."]
    target = Path(__file__).parent / "results" / f"{date.today()}-conversion-limits.md"
    target.write_text("# Converting a checkpoint of the real size, on two CPU cores\n\n" + "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
