"""TransformerEngine's linears: refused where they cannot run, and near to plain ones where they can."""

import copy

import pytest
import torch
from torch import nn

from pixart.model.fp8 import transformer_engine
from pixart.model.fp8.plan import Plan


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_machine_without_a_gpu_is_named():
    with pytest.raises(ValueError, match="this machine has no GPU"):
        transformer_engine.swap_linears(nn.Sequential(nn.Linear(32, 32)), Plan(linears=("0",), recipe="mxfp8"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with FP8")
@pytest.mark.parametrize("recipe", ["current", "mxfp8"])
def test_products_are_near_those_of_bf16(recipe):
    pytest.importorskip("transformer_engine.pytorch", reason="needs the extra transformer-engine")
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(256, 512, device="cuda", dtype=torch.bfloat16))
    swapped = copy.deepcopy(plain)
    try:
        transformer_engine.swap_linears(swapped, Plan(linears=("0",), recipe=recipe))
    except ValueError as error:
        pytest.skip(str(error))
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    results = []
    for model in (plain, swapped):
        output = model(x)
        output.float().square().mean().backward()
        results.append((output.float(), model[0].weight.grad.float()))
    for wanted, got in zip(*results, strict=True):
        assert 10 * torch.log10(wanted.square().sum() / (wanted - got).square().sum()) > 20
