from typing import get_args

import pytest
import torch

from conversion.options import Way
from conversion.stage2.modulation import absorbed_scales, silent
from conversion.stage2.reparameterize import fates as fates_of
from conversion.stage2.reparameterize import to_stage2
from conversion.stage2.strategies import (
    SAMPLE_STEPS,
    SAMPLES,
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


def converted(start: Checkpoint, way: Way, latents) -> tuple[Checkpoint, dict[str, str]]:
    modulations, average = find_modulations(start, load_model(start.config, start.model), way, latents)
    result = to_stage2(start, modulations[way], average, TEXT_DIM)
    return result, fates_of(start, result.config, modulations[way])


def models(start: Checkpoint, result: Checkpoint) -> tuple[DiT, DiT]:
    return load_model(start.config, start.model), load_model(result.config, result.model)


@torch.no_grad()
def errors(start: Checkpoint, result: Checkpoint, latents, times) -> torch.Tensor:
    """Of the model that a conversion results in, on noise of its own."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    found = []
    for value in times:
        t = torch.full((len(latents),), value)
        wanted, got = (
            model(interpolate(latents, noise, t), t, **silent(model, len(latents), "cpu"))
            for model in models(start, result)
        )
        found.append(relative_error(got, wanted))
    return torch.tensor(found)


@torch.no_grad()
def test_paper_is_exact_at_its_t_whatever_the_text(stage1, latents):
    result, _ = converted(stage1, "paper", latents)
    assert errors(stage1, result, latents, [0.5]) < 2e-6
    assert errors(stage1, result, latents, [0.05]) > 1e-3
    _, stage2 = models(stage1, result)
    text, mask = torch.randn(16, 6, TEXT_DIM), torch.rand(16, 6) < 0.7
    mask[:, 0] = True
    t = torch.full((16,), 0.3)
    silent = stage2(latents, t, text=torch.zeros(16, 1, TEXT_DIM), text_mask=torch.ones(16, 1, dtype=torch.bool))
    assert torch.equal(stage2(latents, t, text=text, text_mask=mask), silent)


@pytest.mark.slow
def test_the_ways_in_their_order(stage1, latents):
    """The error under t's training distribution, and that of pictures: each way is several times better."""
    model = load_model(stage1.config, stage1.model)
    modulations, _ = find_modulations(stage1, model, "distilled", latents)
    assert tuple(modulations) == get_args(Way)
    tried, t = list(modulations.values()), torch.linspace(-2.5, 2.5, 9).sigmoid()
    output = {way: mean for way, (_, mean) in zip(modulations, output_errors(model, tried, latents, t), strict=True)}
    pictures = dict(zip(modulations, sample_errors(model, tried, latents), strict=True))
    assert output["fitted"] < output["paper"] / 3
    assert output["distilled"] < output["fitted"]
    assert output["distilled"] < output["paper"] / 6
    assert pictures["fitted"] < pictures["paper"] / 2


@pytest.mark.parametrize("way", ["paper", "fitted"])
def test_what_is_measured_is_true_of_the_result(stage1, latents, way):
    """Errors are measured on stage 1 with other modulations; stage 2 itself has the same, and the same pictures."""
    model, t = load_model(stage1.config, stage1.model), torch.tensor([0.05, 0.3, 0.9])
    modulations, average = find_modulations(stage1, model, way, latents)
    ((told, _),) = output_errors(model, [modulations[way]], latents, t)
    result = to_stage2(stage1, modulations[way], average, TEXT_DIM)
    assert torch.allclose(errors(stage1, result, latents, t.tolist()), torch.tensor(told), rtol=1e-3)
    pictures = []
    for each in models(stage1, result):
        condition = silent(each, SAMPLES, "cpu")
        pictures.append(sample(each, condition, condition, latent_size=8, steps=SAMPLE_STEPS, guidance=1, seed=0))
    assert relative_error(*reversed(pictures)) == pytest.approx(
        sample_errors(model, [modulations[way]], latents)[0], rel=0.5
    )


def test_model_with_one_modulation_converts_exactly(stage1, latents):
    """Blocks whose modulations are scaled and shifted copies of one are just what stage 2 can say."""
    first = "dit_blocks.0."
    generator = torch.Generator().manual_seed(5)
    for state in (stage1.model, stage1.ema):
        for index in (1, 2):
            for layer in ("adaLN1.weight", "adaLN1.bias"):
                state[f"dit_blocks.{index}.{layer}"] = state[first + layer].clone()
            s = torch.tensor([0.5, -1.5, 2.0])[torch.randint(3, (6, 32), generator=generator)]
            s[1], s[3] = s[0], s[2]  # gamma and beta of one input share theirs
            shift = 0.1 * torch.randn(6, 32, generator=generator)
            # 1 + gamma = s (1 + gamma_0) + shift: the constant is absorbed with the rest
            state[f"dit_blocks.{index}.adaLN2.weight"] = state[f"{first}adaLN2.weight"] * s.flatten()[:, None]
            state[f"dit_blocks.{index}.adaLN2.bias"] = state[f"{first}adaLN2.bias"] * s.flatten() + shift.flatten()
    result, _ = converted(stage1, "fitted", latents)
    assert errors(stage1, result, latents, [0.1, 0.5, 0.9]).max() < 2e-3
    paper, _ = converted(stage1, "paper", latents)
    assert errors(stage1, paper, latents, [0.1, 0.9]).min() > 0.02


@pytest.mark.parametrize("way", ["paper", "fitted"])
def test_every_tensor_has_its_fate(stage1, latents, way):
    result, fates = converted(stage1, way, latents)
    model = DiT(**result.config)
    assert fates.keys() == model.state_dict().keys() == result.model.keys() == result.ema.keys()
    for name, fate in fates.items():
        if fate == "carried":
            assert torch.equal(result.model[name], stage1.model[name]), name
            assert torch.equal(result.ema[name], stage1.ema[name]), name
    carried = {name for name, fate in fates.items() if fate == "carried"}
    assert {"patchify.weight", "linear_out.weight", "adaLN1.weight", "adaLN2.weight", "adaLN2.bias"} <= carried
    assert {name for name, fate in fates.items() if fate == "new"} == {
        name for name in fates if "cross_attention" in name
    }
    shared = {name for name in fates if name in stage1.model and name != "adaLN1.bias"}
    if way == "paper":
        assert shared == carried
    for name, _ in model.named_parameters():
        moment, step = result.optimizer[f"{name}.exp_avg"], result.optimizer[f"{name}.step"]
        if fates[name] == "carried":
            assert torch.equal(moment, stage1.optimizer[f"{name}.exp_avg"])
        zero = name not in shared
        assert step == (0 if zero else 8), name
        assert bool(moment.abs().max() == 0) is zero, name


def test_moments_of_scaled_weights_follow_the_gradient(stage1, latents):
    """W' = s W has gradient g / s: its first moment is m / s, its second v / s^2."""
    result, fates = converted(stage1, "fitted", latents)
    name = "dit_blocks.1.mlp.linear2.weight"
    assert fates[name] == "derived"
    s = result.model[name] / stage1.model[name]
    assert torch.allclose(s, s[:, :1].expand_as(s), rtol=1e-4)  # one scale a row
    assert (s[:, 0] - 1).abs().max() > 0.01
    assert torch.allclose(result.optimizer[f"{name}.exp_avg"], stage1.optimizer[f"{name}.exp_avg"] / s, rtol=1e-4)
    assert torch.allclose(
        result.optimizer[f"{name}.exp_avg_sq"], stage1.optimizer[f"{name}.exp_avg_sq"] / s**2, rtol=1e-4
    )
    column = "dit_blocks.1.attention.attention.q_proj.weight"
    s = result.model[column] / stage1.model[column]
    assert torch.allclose(s, s[:1].expand_as(s), rtol=1e-4)  # one scale a column
    average = result.ema[column] / stage1.ema[column]
    assert torch.allclose(average, s, rtol=1e-4)  # the average has the weights' own scales


def test_absorbed_scales_are_broadcast_to_rows_and_columns():
    scales = torch.arange(6 * 4.0)
    found = dict(absorbed_scales(2, scales))
    assert found["dit_blocks.2.attention.attention.q_proj.weight"].tolist() == [0, 1, 2, 3]
    assert found["dit_blocks.2.mlp.linear1.weight"].tolist() == [8, 9, 10, 11]
    assert found["dit_blocks.2.attention.attention.out_proj.weight"].tolist() == [[16], [17], [18], [19]]
    assert found["dit_blocks.2.mlp.linear2.bias"].tolist() == [20, 21, 22, 23]
    assert "dit_blocks.2.attention.attention.q_proj.bias" not in found
