"""The GPU kernels that a compiler makes around an FP8 linear, looked at on a machine without a GPU.

By the environment of vLLM, whose torch is the CUDA build.
"""

import json
import os
import subprocess

import pytest

from tests.vllm_fixture import PYTHON, ROOT, VARIABLES, needs_vllm


@pytest.mark.vllm
@needs_vllm
def test_a_cast_is_part_of_the_pass_that_makes_its_tensor():
    """Amax and bias gradient too: no tensor of the size of activations is read a second time for FP8."""
    command = [PYTHON, "-m", "tests.gpu_kernels"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | VARIABLES, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["products"] == 3
    large = [kernel for kernel in found["kernels"].values() if kernel["stores"]]
    assert len(large) == 2  # and each writes one such tensor, in FP8
    (norm,) = [kernel for kernel in large if kernel["norm"]]
    (gradient,) = [kernel for kernel in large if kernel["activation"]]
    assert (norm["stores"], norm["e4m3"], norm["amax"]) == (1, True, True)
    assert (gradient["stores"], gradient["e5m2"], gradient["amax"], gradient["column_sum"]) == (1, True, True, True)
    (weight,) = [kernel for kernel in found["kernels"].values() if kernel["e4m3"] and not kernel["norm"]]
    assert not weight["stores"]  # its one is flat: cast once for both products
