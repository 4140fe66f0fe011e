from typing import get_args

import pytest
import torch

from conversion.options import Strategy
from conversion.stage2.modulation import absorbed_scales, null_condition
from conversion.stage2.reparameterize import tensor_provenance, to_stage2
from conversion.stage2.strategies import (
    NUM_SAMPLES,
    SAMPLE_STEPS,
    find_modulations,
    output_errors,
    relative_error,
    sample_errors,
)
from pixart.checkpoint.directory import Checkpoint
from pixart.model.dit import DiT, load_model
from pixart.model.rectified_flow import interpolate
from pixart.sampling.denoise import sample

TEXT_DIM = 24


@pytest.fixture
def latents() -> torch.Tensor:
    return torch.randn(16, 4, 8, 8, generator=torch.Generator().manual_seed(3))


def convert(start: Checkpoint, strategy: Strategy, latents) -> tuple[Checkpoint, dict[str, str]]:
    modulations, ema_modulation = find_modulations(start, load_model(start.config, start.model), strategy, latents)
    result = to_stage2(start, modulations[strategy], ema_modulation, TEXT_DIM)
    return result, tensor_provenance(start, result.config, modulations[strategy])


def models(start: Checkpoint, result: Checkpoint) -> tuple[DiT, DiT]:
    return load_model(start.config, start.model), load_model(result.config, result.model)


@torch.no_grad()
def errors(start: Checkpoint, result: Checkpoint, latents, times) -> torch.Tensor:
    """Return the relative output error of the converted model at each time, with noise from an independent seed."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    result_errors = []
    for value in times:
        t = torch.full((len(latents),), value)
        expected, actual = (
            model(interpolate(latents, noise, t), t, **null_condition(model, len(latents), "cpu"))
            for model in models(start, result)
        )
        result_errors.append(relative_error(actual, expected))
    return torch.tensor(result_errors)


@torch.no_grad()
def test_paper_strategy_is_exact_at_its_t_for_any_text(stage1, latents):
    result, _ = convert(stage1, "paper", latents)
    assert errors(stage1, result, latents, [0.5]) < 2e-6
    assert errors(stage1, result, latents, [0.05]) > 1e-3
    _, stage2 = models(stage1, result)
    text, mask = torch.randn(16, 6, TEXT_DIM), torch.rand(16, 6) < 0.7
    mask[:, 0] = True
    t = torch.full((16,), 0.3)
    without_text = stage2(latents, t, text=torch.zeros(16, 1, TEXT_DIM), text_mask=torch.ones(16, 1, dtype=torch.bool))
    assert torch.equal(stage2(latents, t, text=text, text_mask=mask), without_text)


@pytest.mark.slow
def test_strategies_improve_in_order(stage1, latents):
    """The output error under the training distribution of t falls by a factor each time, the samples' error too."""
    model = load_model(stage1.config, stage1.model)
    modulations, _ = find_modulations(stage1, model, "distilled", latents)
    assert tuple(modulations) == get_args(Strategy)
    candidates, t = list(modulations.values()), torch.linspace(-2.5, 2.5, 9).sigmoid()
    curves = output_errors(model, candidates, latents, t)
    output = {strategy: mean for strategy, (_, mean) in zip(modulations, curves, strict=True)}
    samples = dict(zip(modulations, sample_errors(model, candidates, latents), strict=True))
    assert output["fitted"] < output["paper"] / 3
    assert output["distilled"] < output["fitted"]
    assert output["distilled"] < output["paper"] / 6
    assert samples["fitted"] < samples["paper"] / 2


@pytest.mark.parametrize("strategy", ["paper", "fitted"])
def test_reported_errors_are_those_of_the_result(stage1, latents, strategy):
    """Errors are measured on stage 1 with overridden modulations; the stage-2 model has the same errors."""
    model, t = load_model(stage1.config, stage1.model), torch.tensor([0.05, 0.3, 0.9])
    modulations, ema_modulation = find_modulations(stage1, model, strategy, latents)
    ((reported, _),) = output_errors(model, [modulations[strategy]], latents, t)
    reported_sample_error = sample_errors(model, [modulations[strategy]], latents)[0]
    result = to_stage2(stage1, modulations[strategy], ema_modulation, TEXT_DIM)
    assert torch.allclose(errors(stage1, result, latents, t.tolist()), torch.tensor(reported), rtol=1e-3)
    samples = []
    for model in models(stage1, result):
        condition = null_condition(model, NUM_SAMPLES, "cpu")
        samples.append(sample(model, condition, condition, latent_size=8, steps=SAMPLE_STEPS, guidance=1, seed=0))
    assert relative_error(*reversed(samples)) == pytest.approx(reported_sample_error, rel=0.5)


def test_scaled_and_shifted_modulations_convert_exactly(stage1, latents):
    """Stage 2 can represent blocks whose modulations are scaled and shifted copies of a single one."""
    first = "dit_blocks.0."
    generator = torch.Generator().manual_seed(5)
    for state in (stage1.model, stage1.ema):
        for index in (1, 2):
            for layer in ("adaLN1.weight", "adaLN1.bias"):
                state[f"dit_blocks.{index}.{layer}"] = state[first + layer].clone()
            s = torch.tensor([0.5, -1.5, 2.0])[torch.randint(3, (6, 32), generator=generator)]
            s[1], s[3] = s[0], s[2]  # gamma and beta of one norm share a scale
            shift = 0.1 * torch.randn(6, 32, generator=generator)
            # 1 + gamma = s (1 + gamma_0) + shift: the constant 1 is scaled too
            state[f"dit_blocks.{index}.adaLN2.weight"] = state[f"{first}adaLN2.weight"] * s.flatten()[:, None]
            state[f"dit_blocks.{index}.adaLN2.bias"] = state[f"{first}adaLN2.bias"] * s.flatten() + shift.flatten()
    result, _ = convert(stage1, "fitted", latents)
    assert errors(stage1, result, latents, [0.1, 0.5, 0.9]).max() < 2e-3
    paper, _ = convert(stage1, "paper", latents)
    assert errors(stage1, paper, latents, [0.1, 0.9]).min() > 0.02


@pytest.mark.parametrize("strategy", ["paper", "fitted"])
def test_provenance_of_every_tensor(stage1, latents, strategy):
    result, provenance = convert(stage1, strategy, latents)
    model = DiT(**result.config)
    assert provenance.keys() == model.state_dict().keys() == result.model.keys() == result.ema.keys()
    for name, kind in provenance.items():
        if kind == "carried":
            assert torch.equal(result.model[name], stage1.model[name]), name
            assert torch.equal(result.ema[name], stage1.ema[name]), name
    carried = {name for name, kind in provenance.items() if kind == "carried"}
    assert {"patchify.weight", "linear_out.weight", "adaLN1.weight", "adaLN2.weight", "adaLN2.bias"} <= carried
    assert {name for name, kind in provenance.items() if kind == "new"} == {
        name for name in provenance if "cross_attention" in name
    }
    shared = {name for name in provenance if name in stage1.model and name != "adaLN1.bias"}
    if strategy == "paper":
        assert shared == carried
    for name, _ in model.named_parameters():
        moment, step = result.optimizer[f"{name}.exp_avg"], result.optimizer[f"{name}.step"]
        if provenance[name] == "carried":
            assert torch.equal(moment, stage1.optimizer[f"{name}.exp_avg"])
        zero = name not in shared
        assert step == (0 if zero else 8), name
        assert bool(moment.abs().max() == 0) is zero, name


def test_moments_of_scaled_weights_follow_the_gradient(stage1, latents):
    """W' = s W has gradient g / s: its first moment is m / s, its second v / s^2."""
    result, provenance = convert(stage1, "fitted", latents)
    name = "dit_blocks.1.mlp.linear2.weight"
    assert provenance[name] == "derived"
    s = result.model[name] / stage1.model[name]
    assert torch.allclose(s, s[:, :1].expand_as(s), rtol=1e-4)  # one scale per row
    assert (s[:, 0] - 1).abs().max() > 0.01
    assert torch.allclose(result.optimizer[f"{name}.exp_avg"], stage1.optimizer[f"{name}.exp_avg"] / s, rtol=1e-4)
    assert torch.allclose(
        result.optimizer[f"{name}.exp_avg_sq"], stage1.optimizer[f"{name}.exp_avg_sq"] / s**2, rtol=1e-4
    )
    column = "dit_blocks.1.attention.attention.q_proj.weight"
    s = result.model[column] / stage1.model[column]
    assert torch.allclose(s, s[:1].expand_as(s), rtol=1e-4)  # one scale per column
    ema_scale = result.ema[column] / stage1.ema[column]
    assert torch.allclose(ema_scale, s, rtol=1e-4)  # the EMA has the scales of the weights


def test_absorbed_scales_are_broadcast_to_rows_and_columns():
    scales = torch.arange(6 * 4.0)
    factors = dict(absorbed_scales(2, scales))
    assert factors["dit_blocks.2.attention.attention.q_proj.weight"].tolist() == [0, 1, 2, 3]
    assert factors["dit_blocks.2.mlp.linear1.weight"].tolist() == [8, 9, 10, 11]
    assert factors["dit_blocks.2.attention.attention.out_proj.weight"].tolist() == [[16], [17], [18], [19]]
    assert factors["dit_blocks.2.mlp.linear2.bias"].tolist() == [20, 21, 22, 23]
    assert "dit_blocks.2.attention.attention.q_proj.bias" not in factors
