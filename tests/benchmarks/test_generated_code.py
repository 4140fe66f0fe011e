"""Operations, bytes and launches counted in compiled code equal those of the compiled formula."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from benchmarks.generated_code import Work, recorded, total
from benchmarks.train_step import PARAMETER_BYTES, roofline_seconds

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="needs g++ to compile for a CPU")

ROWS, INPUTS, OUTPUTS = 64, 96, 32


@pytest.mark.slow
def test_a_linear_and_its_activation_forward_and_backward():
    x = torch.randn(ROWS, INPUTS, requires_grad=True)
    weight = torch.randn(OUTPUTS, INPUTS, requires_grad=True)
    compiled = torch.compile(lambda x, weight: F.silu(x @ weight.t()), fullgraph=True)
    with recorded() as works:
        compiled(x, weight).backward(torch.ones(ROWS, OUTPUTS))
    torch._dynamo.reset()
    forward, backward = works
    product = 2 * ROWS * INPUTS * OUTPUTS
    assert forward.operations == {"bf16": product}  # the type of everything that is not FP8
    assert backward.operations == {"bf16": 2 * product}
    assert (forward.launches["gemms"], backward.launches["gemms"]) == (1, 2)
    activations = ROWS * OUTPUTS * torch.float32.itemsize
    assert forward.generated_bytes == 2 * activations  # reads the GEMM's output, writes the activation
    assert backward.generated_bytes == 3 * activations  # reads the GEMM's output and the gradient, writes a gradient
    assert total(works).attentions == 0


@pytest.mark.slow
def test_attention_is_counted_apart():
    q = torch.randn(2, 4, 16, 8, requires_grad=True)
    compiled = torch.compile(lambda q: F.scaled_dot_product_attention(q, q, q), fullgraph=True)
    with recorded() as works:
        compiled(q).sum().backward()
    torch._dynamo.reset()
    assert [work.attentions for work in works] == [1, 1]


def test_roofline_adds_gemm_attention_and_memory_time():
    measured = {"work": {"fp8": 4e12, "bf16": 1e12, "bytes": 3e9}, "parameters": 1_000_000_000}
    rates = {"FP8": 2.0, "BF16": 1.0, "GB/s": 1000.0, "attention, s/image": 0.5}
    seconds = 2 * (4 / 2 + 1 / 1 + 8 * 0.5) + (2 * 3e9 + PARAMETER_BYTES * 1e9) / 1e12
    assert roofline_seconds(measured, rates, blocks=2, batch=8) == pytest.approx(seconds)
    assert roofline_seconds({**measured, "work": None}, rates, blocks=2, batch=8) is None


def test_operation_counts_add_up():
    one = Work(generated_bytes=1, attentions=2)
    one.operations["fp8"] = 3
    assert total([one, one]).operations["fp8"] == 6
    assert total([one, one]).generated_bytes == 2
