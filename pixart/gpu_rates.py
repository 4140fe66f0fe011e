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
