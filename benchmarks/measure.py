"""Shared parts of the benchmarks: options, result pages, and the peak throughput and bandwidth of a device."""

import argparse
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from pixart.model.device_timer import median_seconds

RESULTS = Path(__file__).parent / "results"
GIB = 1 << 30
# Initial batch size by the GPU's minimum memory in GiB; it fits without activation checkpointing. The activations of
# the full-size model in BF16 take about 0.4 GiB per image, and its training state takes 13 GiB.
BATCHES = {76: 128, 138: 256, 170: 320}


def parser(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """Return a parser with the options that the benchmarks share; `repeats` is the default of `--repeats`."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument(
        "--batch", type=int, default=default_batch(), metavar="IMAGES", help="Batch size (default: %(default)s)."
    )
    result.add_argument(
        "--repeats", type=int, default=repeats, metavar="N", help="Timed repetitions (default: %(default)s)."
    )
    result.add_argument(
        "--out",
        type=Path,
        default=RESULTS,
        metavar="FOLDER",
        help="Folder of the results (default: benchmarks/results).",
    )
    return result


def default_batch() -> int:
    """Return a batch size in images that fits the GPU, or 320 without a GPU."""
    if not torch.cuda.is_available():
        return 320
    memory = torch.cuda.get_device_properties(0).total_memory / GIB
    return max((batch for least, batch in BATCHES.items() if memory >= least), default=64)


class Page:
    """Dated Markdown page with one table, rewritten after every row so that a later failure loses no result."""

    def __init__(self, folder: Path, name: str, heading: Sequence[str], columns: Sequence[str]) -> None:
        self.file = folder / f"{date.today()}-{name}.md"
        self.lines = [*heading, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        self.width, self.notes = len(columns), list[str]()
        print("\n".join(self.lines), flush=True)
        self.write()

    def row(self, *cells: str) -> None:
        """Add a row to the table; missing cells at its end are left empty."""
        line = f"| {' | '.join(cells)} |" + " |" * (self.width - len(cells))
        self.lines.append(line)
        print(line, flush=True)
        self.write()

    def failed(self, name: str, error: BaseException) -> None:
        """Add a row with the error message in place of the results of `name`."""
        self.row(name, " ".join(str(error).split())[:200] or type(error).__name__)

    def note(self, *lines: str) -> None:
        """Add a paragraph below the table."""
        self.notes += ["", *lines]
        self.write()

    def write(self) -> None:
        """Write the page to its file."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("\n".join([*self.lines, *self.notes]) + "\n")


def device() -> torch.device:
    """Return the GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """Return the name of the GPU, or "a CPU" without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"


def matrix_rate(size: int, repeats: int = 20) -> float:
    """Return the TFLOP/s of a BF16 GEMM of two size x size matrices."""
    a, b = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, repeats) / 1e12


def fp8_matrix_rate(size: int, repeats: int = 20) -> float:
    """Return the TFLOP/s of an FP8 GEMM of two size x size matrices, or 0 without a GPU."""
    if not torch.cuda.is_available():
        return 0.0
    a, b = (torch.randn(size, size, device=device()).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device())

    def product() -> Tensor:
        return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2 * size**3 / median_seconds(product, repeats) / 1e12


def bandwidth(size: int = 1 << 28, repeats: int = 20) -> float:
    """Return the memory bandwidth in GB/s, reads plus writes, of copying `size` bytes on the device."""
    source = torch.empty(size, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), repeats) / 1e9


def write(name: str, lines: Sequence[str]) -> None:
    """Write the lines of a complete page, dated today, to RESULTS."""
    (RESULTS / f"{date.today()}-{name}.md").write_text("\n".join(lines) + "\n")
