"""What the benchmarks share: pages of results, and what a device's card can do."""

import argparse
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from pixart.model.device_timer import median_seconds

RESULTS = Path(__file__).parent / "results"
GIB = 1 << 30
# Images of a rank that fit a card without activation checkpointing, to begin with: by its memory in GiB, of the real
# model in BF16, of which an image's activations take about 0.4 GiB and the state 13 GiB.
BATCHES = {76: 128, 138: 256, 170: 320}


def parser(description: str | None, repeats: int) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--batch", type=int, default=default_batch(), metavar="IMAGES", help="default: %(default)s")
    found.add_argument("--repeats", type=int, default=repeats, metavar="N", help="default: %(default)s")
    found.add_argument("--out", type=Path, default=RESULTS, metavar="FOLDER", help="default: benchmarks/results")
    return found


def default_batch() -> int:
    """Return a batch that fits the card, 320 where there is none."""
    if not torch.cuda.is_available():
        return 320
    memory = torch.cuda.get_device_properties(0).total_memory / GIB
    return max((batch for least, batch in BATCHES.items() if memory >= least), default=64)


class Page:
    """A dated page with one table, written again with every row, so that what was measured outlasts what fails."""

    def __init__(self, folder: Path, name: str, heading: Sequence[str], columns: Sequence[str]) -> None:
        self.file = folder / f"{date.today()}-{name}.md"
        self.lines = [*heading, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        self.width, self.notes = len(columns), list[str]()
        print("\n".join(self.lines), flush=True)
        self.write()

    def row(self, *cells: str) -> None:
        """Add a row; cells that are left out stay empty."""
        line = f"| {' | '.join(cells)} |" + " |" * (self.width - len(cells))
        self.lines.append(line)
        print(line, flush=True)
        self.write()

    def failed(self, name: str, error: BaseException) -> None:
        """Add a row that says why there is nothing to say."""
        self.row(name, " ".join(str(error).split())[:200] or type(error).__name__)

    def note(self, *lines: str) -> None:
        """Add lines below the table."""
        self.notes += ["", *lines]
        self.write()

    def write(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("\n".join([*self.lines, *self.notes]) + "\n")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def card() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"


def matrix_rate(size: int, repeats: int = 20) -> float:
    """Return the TFLOP/s of one large product in BF16."""
    a, b = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / median_seconds(lambda: a @ b, repeats) / 1e12


def fp8_matrix_rate(size: int, repeats: int = 20) -> float:
    """Return the TFLOP/s of one large product in FP8, 0 where there is no hardware for it."""
    if not torch.cuda.is_available():
        return 0.0
    a, b = (torch.randn(size, size, device=device()).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device())

    def product() -> Tensor:
        return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2 * size**3 / median_seconds(product, repeats) / 1e12


def bandwidth(size: int = 1 << 28, repeats: int = 20) -> float:
    """Return the GB/s read and written by the copy of so many bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), repeats) / 1e9


def write(name: str, lines: Sequence[str]) -> None:
    """Write a dated page of results that is complete."""
    (RESULTS / f"{date.today()}-{name}.md").write_text("\n".join(lines) + "\n")
