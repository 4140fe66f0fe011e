"""GPU kernels that torch.compile generates, inspected on a machine without a GPU.

Runs in the environment of vLLM, which has the CUDA build of torch.
"""

import json
import os
import subprocess

import pytest

from tests.support.vllm_fixture import PYTHON, ROOT, VARIABLES, needs_vllm


def kernels(name: str):
    """Return the description of the kernels of the FP8 linear or of the optimizer."""
    command = [PYTHON, "-m", "tests.support.gpu_kernels", name]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | VARIABLES, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.vllm
@pytest.mark.usefixtures("vllm_environment")
@needs_vllm
def test_casts_are_fused_into_the_producing_kernel():
    """Amax and bias gradient too: no activation is read a second time for FP8."""
    generated = kernels("linear")
    assert generated["gemms"] == 3
    large = [kernel for kernel in generated["kernels"].values() if kernel["stores"]]
    assert len(large) == 2  # each writes one activation, in FP8
    (norm,) = [kernel for kernel in large if kernel["norm"]]
    (gradient,) = [kernel for kernel in large if kernel["activation"]]
    assert (norm["stores"], norm["e4m3"], norm["amax"]) == (1, True, True)
    assert (gradient["stores"], gradient["e5m2"], gradient["amax"], gradient["column_sum"]) == (1, True, True, True)
    (weight,) = [kernel for kernel in generated["kernels"].values() if kernel["e4m3"] and not kernel["norm"]]
    assert not weight["stores"]  # stored with a flat index: cast once for both GEMMs


@pytest.mark.vllm
@pytest.mark.usefixtures("vllm_environment")
@needs_vllm
def test_adamw_and_ema_pass_over_memory_once():
    """Large weights have separate kernels, small ones share kernels; the last kernel updates the step counts."""
    *passes, counts = kernels("optimizer")
    parameters = 4
    assert counts == [2 * parameters, parameters]
    assert len(passes) < parameters
    loads, stores = map(sum, zip(*passes, strict=True))
    assert loads == (5 + 4) * parameters  # weight, gradient, two moments, EMA; and four scalars
    assert stores == 4 * parameters


@pytest.mark.vllm
@needs_vllm
def test_no_kernel_both_clamps_and_transposes_an_fp8_store():
    """Triton 3.8 miscompiles such a kernel (triton-lang/triton, issue 11111)."""
    block = kernels("block")
    casts = [store for store in block["stores"] if store["clamps"]]
    assert len(casts) >= 2 * 6  # an input and an output gradient of each GEMM of the block
    assert all(store["contiguous"] for store in casts)
    assert [store["contiguous"] for store in kernels("transpose")["stores"]] == [False]


@pytest.mark.vllm
@needs_vllm
def test_operations_of_a_block_are_counted_from_its_generated_code():
    """Operations by precision match the shapes: only the keys and values of the text stay in BF16."""
    block = kernels("block")
    images, tokens, text, dim, text_dim = 64, 256, 120, 1152, 2048
    rows = images * tokens
    # Input and output features: fused q, k and v; output; query and output of cross-attention; MLP.
    linears = [(dim, 3 * dim), (dim, dim), (dim, dim), (dim, dim), (dim, 4 * dim), (4 * dim, dim)]
    entry = images * text * text_dim * 2 * dim
    operations = sum(2 * rows * inputs * outputs for inputs, outputs in linears)
    assert block["operations"] == {"fp8": 3 * operations, "bf16": 2 * 2 * entry}  # the text has no gradient
    assert block["attentions"] == 4
    # The GEMM of a weight gradient requires both operands transposed, that of an input gradient the weight.
    transposed = sum(rows * (inputs + outputs) + inputs * outputs for inputs, outputs in linears)
    assert block["transposed_bytes"] == 2 * transposed


@pytest.mark.vllm
@needs_vllm
def test_the_step_of_a_block_is_lean():
    """Of forward and backward pass: traffic of generated kernels, Python operators, and launches of weight casts.

    A unit is one BF16 tensor of all tokens. With a scale for each of queries, keys and values, and their norms in
    another layout than their GEMM's, the passes moved 39.4 and 66.9 units.
    """
    block, blocks = kernels("block10"), 28
    forward, backward = block["units"]
    assert forward <= 31
    assert backward <= 54
    assert block["opaque_calls"] == 0
    assert block["transposed_bytes"] == 0
    assert block["launches"]["gemms"] == 20
    assert blocks * len(kernels("casts")) <= 60
