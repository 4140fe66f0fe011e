"""Rooflines of the GEMMs of a linear, by hand from the rates of the data sheets."""

import pytest

from pixart.gpu_rates import linear_seconds


def test_a_large_linear_takes_its_operations_at_the_peak_rate_and_its_casts():
    rows, size = 1 << 20, 4096
    bf16, fp8 = linear_seconds("B200", rows, size, size)
    operations = 3 * 2 * rows * size * size
    assert bf16 == pytest.approx(operations / 2250e12)
    assert fp8 == pytest.approx(operations / 4500e12 + 3 * (2 * rows * size + size * size) / 8e12)


def test_a_hopper_gpu_copies_operands():
    rows, size = 1 << 20, 4096
    _, fp8 = linear_seconds("H100", rows, size, size)
    assert fp8 == pytest.approx(6 * rows * size * size / 1978.9e12 + 5 * (2 * rows * size + size * size) / 3.35e12)


def test_a_narrow_linear_is_bound_by_memory_and_slower_in_fp8():
    bf16, fp8 = linear_seconds("H100", 1 << 20, 64, 64)
    assert bf16 == pytest.approx(3 * 2 * (2 * (1 << 20) * 64 + 64 * 64) / 3.35e12)
    assert fp8 > bf16


def test_a_gpu_without_fp8_is_refused():
    with pytest.raises(ValueError, match="card A100: has no FP8; allowed are H100, H200, B200"):
        linear_seconds("A100", 16, 16, 16)
