"""Peak rates of GPUs, and the time that a number of operations takes at a share of them."""

from typing import Literal

Card = Literal["A100", "H100", "H200", "B200"]

# Dense TFLOP/s by precision, from NVIDIA's data sheets (their figures with sparsity are twice as high).
PEAK_TFLOPS: dict[Card, dict[str, float]] = {
    "A100": {"bf16": 312.0, "fp32": 156.0},
    "H100": {"bf16": 989.4, "fp8": 1978.9, "fp32": 494.7},
    "H200": {"bf16": 989.4, "fp8": 1978.9, "fp32": 494.7},
    "B200": {"bf16": 2250.0, "fp8": 4500.0, "fp32": 1100.0},
}


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Return a GPU's dense peak in TFLOP/s, or None if the GPU or the precision is not in PEAK_TFLOPS."""
    return next((peaks.get(precision) for gpu, peaks in PEAK_TFLOPS.items() if gpu in device_name), None)


def gpu_hours(flops: float, peak_tflops: float, utilization: float) -> float:
    """Return the hours that one GPU takes for `flops` at a share `utilization` of its peak."""
    return flops / (peak_tflops * 1e12 * utilization) / 3600


# Bandwidth of a GPU's memory in TB/s, from the same data sheets (A100 with 80 GB, the SXM versions).
MEMORY_TB_PER_S: dict[Card, float] = {"A100": 2.039, "H100": 3.35, "H200": 4.8, "B200": 8.0}
FP8_CARDS: tuple[Card, ...] = tuple(card for card, peaks in PEAK_TFLOPS.items() if "fp8" in peaks)
# GPUs whose FP8 GEMMs require transposed copies of some operands (compute capability 9).
TRANSPOSING: tuple[Card, ...] = ("H100", "H200")


def linear_seconds(card: Card, rows: int, inputs: int, outputs: int) -> tuple[float, float]:
    """Return the least seconds of the three GEMMs of a linear in training, in BF16 and in FP8 with its casts.

    Both are rooflines: operations at the peak rate, or operands and results at the memory's bandwidth if that takes
    longer. A cast reads BF16 and writes FP8; a transposed copy reads and writes FP8. The weight's cast is included,
    although it is shared by all rows of a step. Raises ValueError for a card without FP8.
    """
    peaks, bandwidth = PEAK_TFLOPS[card], MEMORY_TB_PER_S[card] * 1e12
    if "fp8" not in peaks:
        raise ValueError(f"card {card}: has no FP8; allowed are {', '.join(FP8_CARDS)}")
    operations = 2 * rows * inputs * outputs
    x, weight, grad = rows * inputs, inputs * outputs, rows * outputs

    def gemms(precision: str, operand_bytes: int) -> float:
        seconds = 0.0
        for result in (grad, x, weight):  # of the forward pass, of the input's gradient, of the weight's gradient
            traffic = operand_bytes * (x + weight + grad - result) + 2 * result
            seconds += max(operations / (peaks[precision] * 1e12), traffic / bandwidth)
        return seconds

    casts = 3 * (x + weight + grad) / bandwidth
    copies = 2 * (x + weight + grad) / bandwidth if card in TRANSPOSING else 0.0
    return gemms("bf16", 2), gemms("fp8", 1) + casts + copies
