import pytest
import torch
from torch import nn

from conversion.batches import synthetic_batches
from conversion.calibration.amax import (
    STATISTICS,
    batch_losses,
    bf16_autocast,
    max_magnitude,
    measure_amax,
    mse_optimal,
)
from conversion.calibration.plan import make_plan
from conversion.stage2.reparameterize import to_stage2
from conversion.stage2.strategies import find_modulations
from pixart.model.dit import load_model
from pixart.model.fp8.ops import E4M3


def stage2_model(stage1):
    latents = torch.randn(8, 4, 8, 8)
    modulations, ema_modulation = find_modulations(stage1, load_model(stage1.config, stage1.model), "paper", latents)
    result = to_stage2(stage1, modulations["paper"], ema_modulation, 48)
    return load_model(result.config, result.model)


def test_plan_covers_every_linear(stage1):
    model = stage2_model(stage1)
    plan = make_plan(model, batch=8)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(plan.linears) | set(plan.kept) == linears | {"patchify"}
    assert not set(plan.linears) & set(plan.kept)
    per_block = {name.removeprefix("dit_blocks.1.") for name in plan.linears if name.startswith("dit_blocks.1.")}
    attention = {f"attention.attention.{part}_proj" for part in ("q", "k", "v", "out")}
    assert per_block == attention | {"cross_attention.q_proj", "cross_attention.out_proj", "mlp.linear1", "mlp.linear2"}


def test_unaligned_linears_stay_in_bf16():
    model = nn.Sequential(nn.Linear(32, 40), nn.Linear(48, 64))
    plan = make_plan(model, batch=1)
    assert plan.linears == ("1",)
    assert "40" in plan.kept["0"]


def test_amax_matches_hooks_on_plain_linears(stage1):
    """The amax is the maximum over all batches; gradients are those of the training loss."""
    batches = synthetic_batches(stage1.config, 48, num_batches=3, batch_size=4)
    model = stage2_model(stage1)
    plan = make_plan(model, batch=4)
    expected = {name: torch.zeros(3) for name in plan.linears}

    def register_hooks(name: str, linear: nn.Linear) -> None:
        def forward(module, inputs, output):
            expected[name][0] = max(expected[name][0], inputs[0].detach().abs().max())
            output.register_hook(backward)

        def backward(grad):
            expected[name][2] = max(expected[name][2], grad.abs().max())

        expected[name][1] = linear.weight.detach().abs().max()
        linear.register_forward_hook(forward)

    for name in plan.linears:
        register_hooks(name, model.get_submodule(name))
    for seed, batch in enumerate(batches):
        with bf16_autocast(model):
            loss = batch_losses(model, {seed: batch}).sum()
        loss.backward()
    actual = measure_amax(stage2_model(stage1), plan.linears, batches)
    for name in plan.linears:
        assert torch.allclose(actual[name], expected[name], rtol=1e-4), name
        has_no_grad = name.endswith("cross_attention.q_proj")  # it feeds an output projection that is zero
        assert bool(actual[name][2] == 0) is has_no_grad, name


def test_empty_plan_has_no_amax(stage1):
    model = stage2_model(stage1)
    assert measure_amax(model, (), synthetic_batches(stage1.config, 48, 1, 2)) == {}


def test_statistics_of_a_heavy_tail():
    """With one outlier in 100,000 values the percentile ignores the outlier, and the mean squared error keeps it."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, generator=generator)
    x[[5, 70_000]] = torch.tensor([900.0, -1000.0])
    amax = {name: float(statistic(x, E4M3)) for name, statistic in STATISTICS.items()}
    assert amax["max"] == 1000
    assert 3.5 < amax["percentile"] < 5
    assert amax["mse"] == pytest.approx(1000, rel=0.05)
    uniform = torch.rand(10_000, generator=generator)
    assert float(mse_optimal(uniform, E4M3)) > 0.8
    assert float(max_magnitude(torch.tensor([1.0, float("nan")]), E4M3)) != 1


def test_patterns_keep_linears_in_bf16(stage1):
    model = stage2_model(stage1)
    plan = make_plan(model, keep=["dit_blocks.0.*", "*linear2"], batch=1)
    assert not [name for name in plan.linears if name.startswith("dit_blocks.0.") or name.endswith("linear2")]
    assert plan.kept["dit_blocks.1.mlp.linear2"] == "matches --keep-bf16 *linear2"
    with pytest.raises(ValueError, match="matches no linear"):
        make_plan(model, keep=["encoder.*"], batch=1)


def test_the_last_blocks_stay_in_bf16(stage1):
    model = stage2_model(stage1)
    plan, blocks = make_plan(model, last_blocks=1, batch=1), len(model.blocks)
    assert [name for name in plan.linears if name.startswith(f"dit_blocks.{blocks - 2}.")]
    assert not [name for name in plan.linears if name.startswith(f"dit_blocks.{blocks - 1}.")]
    assert "--last-blocks-bf16 1" in plan.kept[f"dit_blocks.{blocks - 1}.mlp.linear2"]
    with pytest.raises(ValueError, match=f"the model has {blocks} blocks"):
        make_plan(model, last_blocks=blocks + 1, batch=1)
