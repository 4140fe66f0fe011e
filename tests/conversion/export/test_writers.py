"""Exports of a conversion, loaded by the libraries they are for."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conversion.export.writers import EXPORTS
from conversion.to_fp8 import main
from pixart.checkpoint import directory as checkpoints
from pixart.checkpoint.directory import WEIGHTS
from pixart.model.dit import DiT
from pixart.model.fp8 import linear
from pixart.sampling import loading

pytestmark = pytest.mark.slow


@pytest.fixture
def converted(legacy_file) -> Path:
    exports = [word for name in EXPORTS for word in ("--export", name)]
    sizes = ["--num-batches", "2", "--text-dim", "48", "--base-latent-size", "8"]
    assert main([str(legacy_file), *sizes, *exports]) == 0
    return legacy_file.with_name("ckpt.fp8")


def test_inference_weights_are_the_ema_in_fp8(converted):
    saved = checkpoints.load(converted)
    stored = load_file(converted / "inference" / WEIGHTS)
    assert saved.plan is not None
    for name in saved.plan.linears:
        assert stored[f"{name}.weight"].dtype == torch.float8_e4m3fn
        assert stored[f"{name}.input_scale"] == saved.scales[f"{name}.scale"][linear.INPUT]
        exact = saved.ema[f"{name}.weight"]
        dequantized = stored[f"{name}.weight"].float() / stored[f"{name}.weight_scale"]
        assert (dequantized - exact).abs().max() <= exact.abs().max() / 16  # half a step of a 3-bit mantissa
    model, record = loading.load(converted / "inference")
    assert record["linears"] == list(saved.plan.linears)
    ema_model = DiT(**saved.config)
    ema_model.load_state_dict(saved.ema)
    inputs = {"text": torch.randn(2, 5, 48), "text_mask": torch.ones(2, 5, dtype=torch.bool)}
    latents, t = torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.7])
    with torch.no_grad():
        expected, actual = ema_model(latents, t, **inputs), model(latents, t, **inputs)
    assert 0 < (expected - actual).norm() / expected.norm() < 0.1


@pytest.mark.usefixtures("torchao")
def test_torchao_trains_the_exported_linears(converted):
    import torchao.float8 as torchao

    saved = checkpoints.load(converted)
    record = json.loads((converted / "torchao.json").read_text())
    model = DiT(**saved.config)
    config = torchao.Float8LinearConfig(emulate=True)
    torchao.convert_to_float8_training(
        model, config=config, module_filter_fn=lambda module, name: name in record["modules"]
    )
    model.load_state_dict(saved.model, strict=True)
    swapped = [name for name, module in model.named_modules() if type(module).__name__ == "Float8Linear"]
    assert swapped == record["modules"]
    inputs = {"text": torch.randn(2, 5, 48), "text_mask": torch.ones(2, 5, dtype=torch.bool)}
    model(torch.randn(2, 4, 8, 8), torch.tensor([0.3, 0.7]), **inputs).square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)
