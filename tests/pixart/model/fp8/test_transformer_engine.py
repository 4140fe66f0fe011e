"""TransformerEngine's linears: a clear error without a GPU, results close to BF16 with one."""

import copy

import pytest
import torch
from torch import nn

from pixart.model.fp8 import transformer_engine
from pixart.model.fp8.plan import Plan
from tests.support.fp8_models import sqnr


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests a machine without a GPU")
def test_error_without_a_gpu():
    with pytest.raises(ValueError, match="this machine has no GPU"):
        transformer_engine.swap_linears(nn.Sequential(nn.Linear(32, 32)), Plan(linears=("0",), recipe="mxfp8"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with FP8")
@pytest.mark.parametrize("recipe", ["current", "mxfp8"])
def test_results_are_close_to_bf16(recipe):
    pytest.importorskip("transformer_engine.pytorch", reason="needs the extra transformer-engine")
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(256, 512, device="cuda", dtype=torch.bfloat16))
    swapped = copy.deepcopy(linear)
    try:
        transformer_engine.swap_linears(swapped, Plan(linears=("0",), recipe=recipe))
    except ValueError as error:
        pytest.skip(str(error))
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    results = []
    for model in (linear, swapped):
        output = model(x)
        output.float().square().mean().backward()
        results.append((output.float(), model[0].weight.grad.float()))
    for expected, actual in zip(*results, strict=True):
        assert sqnr(expected, actual) > 20
