"""What the benchmarks share: the page of results, and what a device's card can do."""

import argparse
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from pixart.model.device_timer import seconds

RESULTS = Path(__file__).parent / "results"


def parser(description: str | None, repeats: int) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--batch", type=int, default=320)
    found.add_argument("--repeats", type=int, default=repeats)
    return found


def write(name: str, lines: Sequence[str]) -> None:
    """The dated page of results."""
    (RESULTS / f"{date.today()}-{name}.md").write_text("\n".join(lines) + "\n")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def card() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"


def matrix_rate(size: int, repeats: int = 20) -> float:
    """TFLOP/s of one large product in BF16."""
    a, b = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, repeats) / 1e12


def fp8_matrix_rate(size: int, repeats: int = 20) -> float:
    """TFLOP/s of one large product in FP8; 0 where there is no hardware for it."""
    if not torch.cuda.is_available():
        return 0.0
    a, b = (torch.randn(size, size, device=device()).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device())

    def product() -> Tensor:
        return torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2 * size**3 / seconds(product, repeats) / 1e12


def bandwidth(size: int = 1 << 28, repeats: int = 20) -> float:
    """GB/s read and written by the copy of so many bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), repeats) / 1e9
