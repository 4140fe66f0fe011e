"""FP8 on hardware against its emulation: marked `gpu`, as the machine needs one."""

import pytest
import torch

from pixart.model.fp8 import scaling
from pixart.model.fp8.ops import E4M3, E5M2, quantize
from pixart.model.fp8.plan import Plan
from tests.support.fp8_models import fp8_model, inputs, sqnr

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs a GPU with FP8"
    ),
]


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=["E4M3", "E5M2"])
def test_the_cast_is_the_emulated_one(fmt):
    values = torch.arange(65536).to(torch.int32).to(torch.int16).view(torch.bfloat16).float()
    values = values[values.isfinite()]
    scale = torch.tensor(3.0)
    assert torch.equal(quantize(values.cuda(), scale.cuda(), fmt).float().cpu(), quantize(values, scale, fmt))


def step(device: str, *, exact: bool = False, compile: bool = False) -> dict[str, torch.Tensor]:
    """Output and gradients of a pass after one that has set the scales; `exact` without FP8."""
    model = fp8_model(2, linears=() if exact else None).to(device)
    if compile:
        for block in model.dit_blocks:
            block.forward = torch.compile(block.forward, fullgraph=True)
    x, t, text, mask = (
        tensor.to(device) for tensor in inputs(tokens=8)
    )  # sums of FP8 products are of 16 values or a multiple
    for _ in range(2):
        model.zero_grad()
        output = model(x, t, text=text, text_mask=mask)
        output.square().mean().backward()
        scaling.update_scales(model, Plan(linears=()))
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: tensor.detach().float().cpu() for name, tensor in {"output": output, **found}.items()}


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_signal_to_noise_is_that_of_the_emulation(compile):
    """Of output and every gradient against float32, on average within half a decibel."""
    exact, emulated, found = step("cpu", exact=True), step("cpu"), step("cuda", compile=compile)
    gaps = [sqnr(exact[name], emulated[name]) - sqnr(exact[name], found[name]) for name in exact if name in found]
    assert sum(gaps) / len(gaps) <= 0.5
    assert gaps[0] <= 0.5
