"""Run the GPU tests and benchmarks in short sessions on a machine without network access.

First, on a machine with this suite and network access:

    python -m benchmarks.gpu_day prepare [--images FOLDER --vae FOLDER]

writes `.gpuday/`, which contains wheels and a small dataset with its encoders; copy it with the tracked files. Then, on
the GPU machine and from the repository's root, run the parts in order of importance; each takes less than ten minutes:

    python3 benchmarks/gpu_day.py correctness     # GEMMs against float64, tests marked gpu, attention, GEMM throughput
    python3 benchmarks/gpu_day.py speed           # a training step with each backend, at the largest batch that fits
    python3 benchmarks/gpu_day.py small           # the same with 64 and 32 images per rank, as in a large run
    python3 benchmarks/gpu_day.py training        # 500 steps in BF16 and FP8 from one conversion, and sampling

Results are written row by row to the folder `--out` (default: $OUT, else benchmarks/results). If a step fails or
exceeds its time limit, the summary of its part names it, and the next step starts. `--tiny` selects sizes for a CPU.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BUNDLE = ROOT / ".gpuday"
WHEELS, DATASET = BUNDLE / "wheels", BUNDLE / "dataset"
SITE = Path("/tmp/pixart-gpu-day-site")
MIB = 1 << 20
LIMIT_MIB = 60  # of the tracked files and BUNDLE together
TINY_LIMIT = 1800  # seconds per step on a CPU, where compilation dominates
TAIL_LINES = 40  # last lines of a step's output that are printed
PYTHON, PLATFORMS = "3.12", [f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17)]
# Packages that the GPU machine lacks; all other requirements are installed on it.
PACKAGES = [
    *("diffusers==0.42.1", "importlib_metadata", "torchao==0.17.0", "submitit==1.5.4"),
    *("zarr==3.4.2", "numcodecs", "donfig", "google-crc32c>=1.9,<2", "msgspec"),
]
ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "HF_HUB_OFFLINE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "NCCL_IB_DISABLE": "1",
    "TORCHINDUCTOR_CACHE_DIR": "/tmp/pixart-gpu-day-inductor",
    "TRITON_CACHE_DIR": "/tmp/pixart-gpu-day-triton",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
ALL_VARIANTS = ["BF16", "FP8 native", "torchao tensorwise", "diffusers PixArtTransformer2DModel, BF16"]
ALL_VARIANTS += ["torchao rowwise", "BF16 eager", "FP8 native, weight gradient in BF16"]
RANK_VARIANTS = ["BF16", "FP8 native", "torchao tensorwise"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of a part.

    `words` are the interpreter's arguments, and `tiny` replaces them for `--tiny` if it is not empty.
    """

    name: str
    limit: int  # time limit in seconds
    words: Sequence[str]
    tiny: Sequence[str] = ()
    writes: bool = True  # accepts --out


def benchmark(name: str, limit: int, *words: str, tiny: Sequence[str]) -> Step:
    """Return the step that runs a benchmark module with `words` or, for `--tiny`, with `tiny` as its arguments."""
    module = ["-m", f"benchmarks.{name}"]
    return Step(name=name, limit=limit, words=[*module, *words], tiny=[*module, *tiny])


def train_step(batch: Sequence[str], limit: int, variants: Sequence[str]) -> Step:
    """Return the step that benchmarks the `variants` of a training step; `batch` are further arguments."""
    small = ["--batch", "2", "--blocks", "1", "--dim", "64", "--repeats", "1", "--matrix", "256", "--limit", "1500"]
    return benchmark("train_step", limit, *batch, "--only", *variants, tiny=[*small, "--only", *variants[:2]])


GPU_TESTS = Step(
    name="tests",
    limit=270,
    words=["-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "tests/pixart/model", "tests/conversion"],
    writes=False,
)
PARTS = {
    "correctness": [
        benchmark("gemm_accuracy", 60, tiny=["--tiny"]),
        GPU_TESTS,
        benchmark("attention", 120, tiny=["--batch", "1"]),
        benchmark("gemm", 130, tiny=["--batch", "1", "--dim", "32", "--repeats", "1"]),
    ],
    "speed": [train_step([], 580, ALL_VARIANTS)],
    "small": [train_step(["--batch", "64"], 300, RANK_VARIANTS), train_step(["--batch", "32"], 280, RANK_VARIANTS)],
    "training": [
        benchmark(
            "gpu_training",
            580,
            str(DATASET),
            tiny=[str(DATASET), "--tiny", "--steps", "4", "--stage1-steps", "4", "--batch", "16", "--pictures", "2"],
        )
    ],
}


def run_part(name: str, out: Path, *, tiny: bool) -> int:
    """Run the steps of a part in order and return the number of failed ones; the summary is written after each step."""
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join([str(SITE), str(ROOT)])}
    summary = out / f"{date.today()}-gpu-day-{name}.md"
    lines = [f"# GPU day, {name}", "", "| step | seconds | outcome |", "|---|---|---|"]
    failed = 0
    for step in PARTS[name]:
        words = [sys.executable, *(step.tiny or step.words if tiny else step.words)]
        words += ["--out", str(out)] if step.writes else []
        print(f"=== {step.name} [{time.strftime('%H:%M:%S')}]", flush=True)
        begun = time.monotonic()
        outcome = run(words, environment, TINY_LIMIT if tiny else step.limit, out / f"{name}.log")
        failed += outcome != "ok"
        lines.append(f"| {step.name} | {time.monotonic() - begun:.0f} | {outcome} |")
        print(lines[-1], flush=True)
        summary.write_text("\n".join(lines) + "\n")
    return failed


def run(words: Sequence[str], environment: dict[str, str], limit: int, log: Path) -> str:
    """Run a command with its output appended to a log, print the last lines, and return a description of its end.

    The description is "ok" for exit code 0. A command that exceeds `limit` seconds is killed.
    """
    with log.open("ab") as file:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)
        try:
            code = process.wait(limit)
            outcome = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            outcome = f"killed after {limit} s"
    print("\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:]), flush=True)
    return outcome


def install() -> None:
    """Install the wheels of BUNDLE to SITE, unless they are installed already.

    Raises SystemExit if there are no wheels.
    """
    if (SITE / "diffusers").exists():
        return
    wheels = sorted(map(str, WHEELS.glob("*.whl")))
    if not wheels:
        raise SystemExit(f"error: {WHEELS} has no wheels; run `python -m benchmarks.gpu_day prepare` and copy {BUNDLE}")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-cache-dir", "--upgrade"]
    subprocess.run([*pip, "--target", str(SITE), *wheels], check=True)


def prepare(images: Path | None, vae: Path | None) -> None:
    """Create BUNDLE: download the wheels and create the dataset.

    Raises SystemExit if BUNDLE and the tracked files together exceed LIMIT_MIB.
    """
    from benchmarks.gpu_day_dataset import make_dataset

    shutil.rmtree(BUNDLE, ignore_errors=True)
    WHEELS.mkdir(parents=True)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(WHEELS),
    ]
    pip += ["--python-version", PYTHON, "--implementation", "cp"]
    pip += [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run(
        [*pip, *PACKAGES], check=True, env=os.environ | {"PIP_CONSTRAINT": "", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    )
    make_dataset(BUNDLE, DATASET, images, vae)
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    sizes = {
        "tracked files": sum((ROOT / os.fsdecode(name)).stat().st_size for name in tracked if name),
        **{path.name: size_of(path) for path in sorted(BUNDLE.iterdir())},
    }
    for name, size in sizes.items():
        print(f"{size / MIB:6.1f} MiB  {name}")
    if sum(sizes.values()) > LIMIT_MIB * MIB:
        raise SystemExit(f"error: {sum(sizes.values()) / MIB:.0f} MiB in total; it must be at most {LIMIT_MIB} MiB")


def size_of(path: Path) -> int:
    """Return the total size in bytes of the files in a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["prepare", *PARTS])
    parser.add_argument(
        "--images", type=Path, metavar="FOLDER", help="Folder of class folders with images (default: rendered scenes)."
    )
    parser.add_argument(
        "--vae", type=Path, metavar="FOLDER", help="Folder of a diffusers autoencoder (default: that of the demo)."
    )
    parser.add_argument("--tiny", action="store_true", help="Use sizes for a CPU, as a rehearsal.")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="Folder of the results (default: $OUT, else benchmarks/results)."
    )
    options = parser.parse_args()
    if options.part == "prepare":
        prepare(options.images, options.vae)
        return 0
    install()
    out = options.out or Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    return 1 if run_part(options.part, out.absolute(), tiny=options.tiny) else 0


if __name__ == "__main__":
    sys.exit(main())
