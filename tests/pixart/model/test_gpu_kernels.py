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
@pytest.mark.usefixtures("vllm_environment")
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
@pytest.mark.usefixtures("vllm_environment")
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
