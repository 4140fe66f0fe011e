"""The GPU kernels that a compiler makes, looked at on a machine without a GPU.

By the environment of vLLM, whose torch is the CUDA build.
"""

import json
import os
import subprocess

import pytest

from tests.support.vllm_fixture import PYTHON, ROOT, VARIABLES, needs_vllm


def kernels(of: str):
    command = [PYTHON, "-m", "tests.support.gpu_kernels", of]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | VARIABLES, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.vllm
@needs_vllm
def test_a_cast_is_part_of_the_pass_that_makes_its_tensor():
    """Amax and bias gradient too: no tensor of the size of activations is read a second time for FP8."""
    found = kernels("linear")
    assert found["products"] == 3
    large = [kernel for kernel in found["kernels"].values() if kernel["stores"]]
    assert len(large) == 2  # and each writes one such tensor, in FP8
    (norm,) = [kernel for kernel in large if kernel["norm"]]
    (gradient,) = [kernel for kernel in large if kernel["activation"]]
    assert (norm["stores"], norm["e4m3"], norm["amax"]) == (1, True, True)
    assert (gradient["stores"], gradient["e5m2"], gradient["amax"], gradient["column_sum"]) == (1, True, True, True)
    (weight,) = [kernel for kernel in found["kernels"].values() if kernel["e4m3"] and not kernel["norm"]]
    assert not weight["stores"]  # its one is flat: cast once for both products


@pytest.mark.vllm
@needs_vllm
def test_adamw_and_the_average_pass_over_memory_once():
    """Large weights by themselves, small ones together, and last the counts of steps; nothing is stored in between."""
    *passes, counts = kernels("optimizer")
    parameters = 4
    assert counts == [2 * parameters, parameters]
    assert len(passes) < parameters
    loads, stores = map(sum, zip(*passes, strict=True))
    assert loads == (5 + 4) * parameters  # weight, gradient, two moments and average; and four numbers
    assert stores == 4 * parameters


@pytest.mark.vllm
@needs_vllm
def test_no_fp8_store_is_transposed_beside_a_clamp():
    """Triton 3.8 miscompiles such a kernel (triton-lang/triton, issue 11111)."""
    block = kernels("block")
    casts = [store for store in block["stores"] if store["clamps"]]
    assert len(casts) >= 2 * 6  # an input and a gradient of each product of the block
    assert all(store["contiguous"] for store in casts)
    assert [store["contiguous"] for store in kernels("transpose")["stores"]] == [False]


@pytest.mark.vllm
@needs_vllm
def test_work_of_a_block_is_counted_from_its_generated_code():
    """Operations by precision are those of its shapes: the text's keys and values alone stay in BF16."""
    block = kernels("block")
    images, tokens, text, dim, text_dim = 64, 256, 120, 1152, 2048
    rows = images * tokens
    # Inputs and outputs: q, k and v together; the output; query and output of the text's attention; the MLP.
    linears = [(dim, 3 * dim), (dim, dim), (dim, dim), (dim, dim), (dim, 4 * dim), (4 * dim, dim)]
    entry = images * text * text_dim * 2 * dim
    operations = sum(2 * rows * inputs * outputs for inputs, outputs in linears)
    assert block["operations"] == {"fp8": 3 * operations, "bf16": 2 * 2 * entry}  # the text has no gradient
    assert block["attentions"] == 4
    # A weight's gradient wants both operands transposed, an input's gradient the weight.
    transposed = sum(rows * (inputs + outputs) + inputs * outputs for inputs, outputs in linears)
    assert block["transposed_bytes"] == 2 * transposed
