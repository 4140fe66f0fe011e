"""Benchmark the rounding to the FP8 grid on a CPU against a cast to FP8 and back, in the same run.

`python -m benchmarks.rounding` prints a table and writes it to `benchmarks/results/`.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks import measure
from pixart.model.fp8.ops import E4M3, E5M2, Format, quantize

SHAPES = ((1024, 128), (1024, 512), (4096, 1152))
REPEATS = 30


def by_cast(x: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    """Return x * scale, saturated and rounded to `fmt` by a cast to FP8 and back to float32."""
    return (x * scale).clamp_(-fmt.max, fmt.max).to(fmt.dtype).float()


def fastest(function: Callable[[], Tensor]) -> float:
    """Return the seconds of the fastest of REPEATS calls, which other processes disturb least."""
    seconds = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def main() -> None:
    torch.set_num_threads(1)
    lines = ["| format | shape | cast and back, ms | ours, ms | ratio |", "|---|---|---|---|---|"]
    for name, fmt in (("E4M3", E4M3), ("E5M2", E5M2)):
        for shape in SHAPES:
            x, scale = torch.randn(shape), torch.tensor(3.0)
            assert torch.equal(by_cast(x, scale, fmt), quantize(x, scale, fmt))
            cast, ours = fastest(lambda: by_cast(x, scale, fmt)), fastest(lambda: quantize(x, scale, fmt))  # noqa: B023
            lines.append(
                f"| {name} | {shape[0]} x {shape[1]} | {cast * 1e3:.2f} | {ours * 1e3:.2f} | {cast / ours:.1f} |"
            )
    title = f"# Rounding to FP8 on a CPU, one thread, torch {torch.__version__}"
    measure.write("rounding", [title, "", *lines])
    print("\n".join(lines))


if __name__ == "__main__":
    main()
