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
@needs_vllm
def test_adamw_and_ema_pass_over_memory_once():
    """Large weights have kernels of their own, small ones share kernels; the last kernel updates the step counts."""
    *passes, counts = kernels("optimizer")
    parameters = 4
    assert counts == [2 * parameters, parameters]
    assert len(passes) < parameters
    loads, stores = map(sum, zip(*passes, strict=True))
    assert loads == (5 + 4) * parameters  # weight, gradient, two moments, EMA; and four scalars
    assert stores == 4 * parameters
