"""Compare FP8 on a GPU with its emulation on a CPU."""

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
def test_hardware_cast_equals_emulated_cast(fmt):
    values = torch.arange(65536).to(torch.int32).to(torch.int16).view(torch.bfloat16).float()
    values = values[values.isfinite()]
    scale = torch.tensor(3.0)
    assert torch.equal(quantize(values.cuda(), scale.cuda(), fmt).float().cpu(), quantize(values, scale, fmt))


def second_step(device: str, *, fp8: bool = True, compile: bool = False) -> dict[str, torch.Tensor]:
    """Return the output and gradients of the second of two steps, whose scales the first one has set."""
    model = fp8_model(2, linears=None if fp8 else ()).to(device)
    if compile:
        for block in model.dit_blocks:
            block.forward = torch.compile(block.forward, fullgraph=True)
    x, t, text, mask = (tensor.to(device) for tensor in inputs(tokens=8))  # FP8 GEMMs need multiples of 16 rows
    for _ in range(2):
        model.zero_grad()
        output = model(x, t, text=text, text_mask=mask)
        output.square().mean().backward()
        scaling.update_scales(model, Plan(linears=()))
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: tensor.detach().float().cpu() for name, tensor in {"output": output, **grads}.items()}


@pytest.mark.parametrize("compile", [False, True], ids=["eager", "compiled"])
def test_sqnr_equals_that_of_the_emulation(compile):
    """The SQNR of the output, and the mean over output and gradients, is within 0.5 dB of the emulation's."""
    expected, emulated, actual = second_step("cpu", fp8=False), second_step("cpu"), second_step("cuda", compile=compile)
    gaps = [
        sqnr(expected[name], emulated[name]) - sqnr(expected[name], actual[name]) for name in expected if name in actual
    ]
    assert sum(gaps) / len(gaps) <= 0.5
    assert gaps[0] <= 0.5
