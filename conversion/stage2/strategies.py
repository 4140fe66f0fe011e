"""Strategies that turn stage 1's modulations into the shared one, and their output errors against stage 1."""

import itertools
from typing import Any

import torch
from torch import Tensor

from conversion.batches import CalibrationBatch
from conversion.options import Options, Strategy
from conversion.stage2 import distillation, reparameterize
from conversion.stage2.modulation import (
    Modulation,
    ModulationFit,
    num_nodes,
    paper_modulation,
    sensitivity,
    tabulate,
    velocities,
)
from pixart.checkpoint.directory import Checkpoint
from pixart.model.dit import DiT, load_model
from pixart.model.rectified_flow import interpolate, stratified_time

# The fit minimizes errors channel by channel, but the errors of all blocks add up in the output, and further rounds can
# increase it. Each of these settings is therefore tried, and the one with the smallest output error is taken.
ROUNDS = (1, 2, 4, 10)
MAX_SCALES = (4.0, 16.0)
MIN_SELECTION_IMAGES = 4
MAX_IMAGES = 32  # in any measurement of this module
FLOP_BUDGET = {"cpu": 3e11, "cuda": 1e14}  # of a measurement; images are left out or cropped to stay within it
MIN_GRID = 4  # smallest side of a cropped image, in patches
ERROR_LOGITS = torch.linspace(-3, 3, 13)  # logits of the t at which output errors are reported
NUM_SAMPLES = 4
SAMPLE_STEPS = 20


def change_stage(
    start: Checkpoint, options: Options, batch: CalibrationBatch
) -> tuple[Checkpoint, dict[str, str], dict[str, Any] | None]:
    """Convert the training state to the stage in `options`.

    Returns the new state, the provenance of every tensor, and the errors of the strategies for the report (None if the
    stage does not change).
    """
    if start.stage == options.stage:
        return start, dict.fromkeys(start.model, reparameterize.CARRIED), None
    strategy = options.reparameterization
    stage1 = load_model(start.config, start.model, options.device)
    modulations, ema_modulation = find_modulations(start, stage1, strategy, batch.latents)
    t = ERROR_LOGITS.sigmoid()
    latents = subsample_to_budget(stage1, batch.latents, passes=len(modulations) * 2 * len(t)).to(options.device)
    candidates = list(modulations.values())
    curves, means = zip(*output_errors(stage1, candidates, latents, t), strict=True)
    errors = {
        "strategy": strategy,
        "t": t.tolist(),
        "output_error": dict(zip(modulations, curves, strict=True)),
        "mean_error": dict(zip(modulations, means, strict=True)),
        "sample_error": dict(zip(modulations, sample_errors(stage1, candidates, latents), strict=True)),
    }
    modulation = modulations[strategy]
    result = reparameterize.to_stage2(start, modulation, ema_modulation, text_dim=batch.text.shape[-1])
    result.provenance["reparameterization"] = strategy
    return result, reparameterize.tensor_provenance(start, result.config, modulation), errors


def find_modulations(
    source: Checkpoint, model: DiT, strategy: Strategy, latents: Tensor
) -> tuple[dict[Strategy, Modulation], Modulation]:
    """Return the weights' modulation by every strategy up to `strategy`, and the EMA's modulation by `strategy`.

    The EMA gets the scales of the weights, so that it remains an average of them. `model` has the weights of `source`.
    `latents` (B, C, h, w) are normalized; they determine the sensitivities that weight the fit and are subsampled so
    that it takes seconds.
    """
    device = model.adaLN1.weight.device
    omega = sensitivity(model, subsample_to_budget(model, latents, passes=3 * num_nodes(model)).to(device))
    fit, settings = ModulationFit(model, omega), list(itertools.product(ROUNDS, MAX_SCALES))
    candidates = [fit.solve(*setting) for setting in settings]
    selection = subsample_to_budget(model, latents, passes=1 + len(candidates), minimum=MIN_SELECTION_IMAGES)
    noised, t = noise_at_training_times(selection.to(device))
    target, *predictions = velocities(model, tabulate(model, [None, *candidates], t), noised, t)
    errors = [float((prediction - target).square().mean()) for prediction in predictions]  # increase of the loss
    best = errors.index(min(errors))
    modulations: dict[Strategy, Modulation] = {"paper": paper_modulation(model), "fitted": candidates[best]}
    latents = subsample_to_budget(model, latents, passes=4 * distillation.STEPS, minimum=MIN_SELECTION_IMAGES).to(
        device
    )
    if strategy == "distilled":
        modulations[strategy] = distillation.distill(model, modulations["fitted"], latents, train_scales=True)

    ema_model = load_model(source.config, source.ema, device)
    if strategy == "paper":
        return modulations, paper_modulation(ema_model)
    ema_modulation = ModulationFit(ema_model, omega).solve(*settings[best], modulations[strategy].scales)
    if strategy == "distilled":
        ema_modulation = distillation.distill(ema_model, ema_modulation, latents, train_scales=False)
    return modulations, ema_modulation


def subsample_to_budget(model: DiT, latents: Tensor, *, passes: int, minimum: int = 1) -> Tensor:
    """Return as many latents as `passes` forward passes can process within FLOP_BUDGET, at least `minimum`.

    If the budget does not suffice for `minimum` images, they are cropped.
    """
    params = sum(parameter.numel() for name, parameter in model.dit_blocks.named_parameters() if "adaLN" not in name)
    patch = model.config.patch_size
    while True:
        tokens = latents[0, 0].numel() // patch**2
        images = int(FLOP_BUDGET[model.adaLN1.weight.device.type] / (passes * 2 * params * tokens))
        side = max(latents.shape[-2:]) // 2 // patch * patch
        if images >= minimum or side < MIN_GRID * patch:
            return latents[: min(max(images, minimum), MAX_IMAGES)]
        latents = latents[..., :side, :side]


def noise_at_training_times(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Add noise to latents at stratified t -> (B, C, h, w), (B,)."""
    generator = torch.Generator().manual_seed(2)
    t = stratified_time(len(latents), generator).to(latents.device)
    return interpolate(latents, torch.randn(latents.shape, generator=generator).to(latents.device), t), t


def output_errors(
    model: DiT, modulations: list[Modulation], latents: Tensor, t: Tensor
) -> list[tuple[list[float], float]]:
    """Return the relative RMS error of the velocity at every t (T,) and its mean, for each modulation.

    The mean is over the training distribution of t, and correct if the logits of `t` are equidistant.
    """
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)).to(latents.device)
    rows = tabulate(model, [None, *modulations], t)
    squares = torch.zeros(
        1 + len(modulations), len(t), dtype=torch.float64
    )  # of stage 1's velocity, then of the errors
    for pairs in torch.cartesian_prod(torch.arange(len(t)), torch.arange(len(latents))).split(MAX_IMAGES):
        node, image = pairs.unbind(1)
        time, image = t[node].float().to(latents.device), image.to(latents.device)
        noised = interpolate(latents[image], noise[image], time)
        target, *predictions = velocities(model, rows[:, :, node.to(rows.device)], noised, time)
        terms = torch.stack([target, *(prediction - target for prediction in predictions)])
        squares.index_add_(1, node, terms.square().flatten(2).mean(2).double().cpu())
    signal, *errors = squares
    weight = torch.exp(-torch.logit(t.double()).square() / 2)
    return [
        ((error / signal).sqrt().tolist(), float(((weight * error).sum() / (weight * signal).sum()).sqrt()))
        for error in errors
    ]


def sample_errors(model: DiT, modulations: list[Modulation], latents: Tensor) -> list[float]:
    """Return the relative RMS difference of each modulation's samples from stage 1's, from the same initial noise.

    Samples have the size of `latents` and are integrated by Euler's method in SAMPLE_STEPS steps.
    """
    count, parts = min(NUM_SAMPLES, len(latents)), 1 + len(modulations)
    state = torch.randn(latents[:count].shape, generator=torch.Generator().manual_seed(0)).to(latents.device)
    state = state.repeat(parts, 1, 1, 1)
    times = torch.arange(SAMPLE_STEPS, device=latents.device) / SAMPLE_STEPS
    table = tabulate(model, [None, *modulations], times)
    for step, t in enumerate(times):
        rows = table[:, :, step, None].expand(-1, -1, count, -1)
        state = state + velocities(model, rows, state, t.expand(count)).flatten(0, 1) / SAMPLE_STEPS
    target, *samples = state.unflatten(0, (parts, count))
    return [relative_error(sample, target) for sample in samples]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the RMS of the difference, relative to the RMS of `expected`."""
    return float((actual - expected).square().mean().sqrt() / expected.square().mean().sqrt())
