"""Benchmark torch's SDPA backends at the model's head dimension of 72, without padding and padded to 80 and 96.

    python -m benchmarks.attention [--batch 320]

Times the forward and backward pass of self-attention over 256 image tokens and of cross-attention to 120 text tokens
with a padding mask. The same measurement selects the kernel in training (`attention_backend=autotune`).
"""

import torch

from benchmarks import measure
from pixart.model.sdpa_autotune import REPEATS, time_kernels

HEADS, WIDTH, TOKENS, TEXT = 16, 72, 256, 120


def main() -> None:
    parser = measure.parser(__doc__, repeats=REPEATS)
    options = parser.parse_args()
    image, text = (
        time_kernels(
            options.batch, HEADS, WIDTH, TOKENS, keys, measure.device(), masked=keys == TEXT, repeats=options.repeats
        )
        for keys in (TOKENS, TEXT)
    )
    heading = [
        f"# Attention, forward + backward, {HEADS} heads of {WIDTH}, batch {options.batch}, on {measure.device_name()}",
        "",
        f"torch {torch.__version__}; milliseconds, of compiled code on a GPU, including padding.",
    ]
    page = measure.Page(options.out, "attention", heading, ["kernel", "image", "text, masked"])
    for kernel in image | text:
        page.row(
            str(kernel), *(f"{1e3 * seconds[kernel]:.2f}" if kernel in seconds else "" for seconds in (image, text))
        )


if __name__ == "__main__":
    main()
