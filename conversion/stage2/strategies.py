"""The ways from stage 1's modulations to the shared one, and how far from stage 1 each of them is."""

import itertools
from typing import Any

import torch
from torch import Tensor

from conversion.batches import CalibrationBatch
from conversion.options import Options, Way
from conversion.stage2 import distill, reparameterize
from conversion.stage2.modulation import NODES, Fit, Modulation, paper, sensitivity, tables, velocities
from pixart.checkpoint.directory import Checkpoint
from pixart.model.dit import DiT, load_model
from pixart.model.rectified_flow import interpolate, stratified_time

# The fit minimizes errors channel by channel, but those of all blocks add up in the output: more rounds of it can make
# the output worse. So these are tried, |s| within [1 / max_scale, max_scale], and the output's error decides.
ROUNDS = (1, 2, 4, 10)
MAX_SCALES = (4.0, 16.0)
CHOICE_IMAGES = 4  # at the least
IMAGES = 32  # at the most, of whatever is measured here
OPERATIONS = {"cpu": 3e11, "cuda": 1e14}  # that a measurement may take: beyond them, fewer and smaller images
SMALLEST_GRID = 4
ERROR_LOGITS = torch.linspace(-3, 3, 13)  # of the values of t that errors are shown at
SAMPLES = 4
SAMPLE_STEPS = 20


def change_stage(
    start: Checkpoint, options: Options, batch: CalibrationBatch
) -> tuple[Checkpoint, dict[str, str], dict[str, Any] | None]:
    """The training state in the stage that is asked for, the fate of every tensor, and each way's error."""
    if start.stage == options.stage:
        return start, dict.fromkeys(start.model, "carried"), None
    stage1 = load_model(start.config, start.model, options.device)
    modulations, average = find_modulations(start, stage1, options.way, batch.latents)
    t = ERROR_LOGITS.sigmoid()
    latents = affordable(stage1, batch.latents, passes=len(modulations) * 2 * len(t)).to(options.device)
    tried = list(modulations.values())
    curves, means = zip(*output_errors(stage1, tried, latents, t), strict=True)
    found = {
        "way": options.way,
        "t": t.tolist(),
        "output_error": dict(zip(modulations, curves, strict=True)),
        "mean_error": dict(zip(modulations, means, strict=True)),
        "sample_error": dict(zip(modulations, sample_errors(stage1, tried, latents), strict=True)),
    }
    own = modulations[options.way]
    result = reparameterize.to_stage2(start, own, average, text_dim=batch.text.shape[-1])
    result.provenance["reparameterization"] = options.way
    return result, reparameterize.fates(start, result.config, own), found


def find_modulations(
    source: Checkpoint, model: DiT, way: Way, latents: Tensor
) -> tuple[dict[Way, Modulation], Modulation]:
    """The weights' modulation in every way up to `way`, and in that way the modulation of their average.

    The average shares its scales with the weights, so that it remains their average. `model` is the source's, on its
    device; `latents` (B, C, h, w), normalized, weigh the channels of the fit: as many of them as take some seconds.
    """
    device = model.adaLN1.weight.device
    omega = sensitivity(model, affordable(model, latents, passes=3 * NODES).to(device))
    fit, candidates = Fit(model, omega), list(itertools.product(ROUNDS, MAX_SCALES))
    tried = [fit.modulation(*candidate) for candidate in candidates]
    noised, t = at_training_times(affordable(model, latents, passes=1 + len(tried), least=CHOICE_IMAGES).to(device))
    wanted, *got = velocities(model, tables(model, [None, *tried], t), noised, t)
    errors = [float((velocity - wanted).square().mean()) for velocity in got]  # what each adds to the loss
    best = errors.index(min(errors))
    found: dict[Way, Modulation] = {"paper": paper(model), "fitted": tried[best]}
    latents = affordable(model, latents, passes=4 * distill.STEPS, least=CHOICE_IMAGES).to(device)
    if way == "distilled":
        found[way] = distill.distilled(model, found["fitted"], latents, free_scales=True)

    average = load_model(source.config, source.ema, device)
    if way == "paper":
        return found, paper(average)
    averaged = Fit(average, omega).modulation(*candidates[best], found[way].scales)
    if way == "distilled":
        averaged = distill.distilled(average, averaged, latents, free_scales=False)
    return found, averaged


def affordable(model: DiT, latents: Tensor, *, passes: int, least: int = 1) -> Tensor:
    """As many latents as so many forward passes of each can take within OPERATIONS; if need be, their corners."""
    weights = sum(parameter.numel() for name, parameter in model.dit_blocks.named_parameters() if "adaLN" not in name)
    patch = model.config.patch_size
    while True:
        tokens = latents[0, 0].numel() // patch**2
        images = int(OPERATIONS[model.adaLN1.weight.device.type] / (passes * 2 * weights * tokens))
        side = latents.shape[-1] // 2
        if images >= least or side < SMALLEST_GRID * patch:
            return latents[: min(max(images, least), IMAGES)]
        latents = latents[..., :side, :side]


def at_training_times(latents: Tensor) -> tuple[Tensor, Tensor]:
    """Latents with noise at stratified t -> (B, C, h, w), (B,)."""
    generator = torch.Generator().manual_seed(2)
    t = stratified_time(len(latents), generator).to(latents.device)
    return interpolate(latents, torch.randn(latents.shape, generator=generator).to(latents.device), t), t


def output_errors(
    model: DiT, modulations: list[Modulation], latents: Tensor, t: Tensor
) -> list[tuple[list[float], float]]:
    """Relative root-mean-square error of each velocity at every t (T,), and its mean under t's training distribution.

    For the latter, t must be at equal distances of its logit.
    """
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)).to(latents.device)
    by_time = tables(model, [None, *modulations], t)
    squares = torch.zeros(1 + len(modulations), len(t), dtype=torch.float64)  # of stage 1's, then of the errors
    for pairs in torch.cartesian_prod(torch.arange(len(t)), torch.arange(len(latents))).split(IMAGES):
        node, image = pairs.unbind(1)
        time, image = t[node].float().to(latents.device), image.to(latents.device)
        noised = interpolate(latents[image], noise[image], time)
        wanted, *got = velocities(model, by_time[:, :, node.to(by_time.device)], noised, time)
        found = torch.stack([wanted, *(velocity - wanted for velocity in got)])
        squares.index_add_(1, node, found.square().flatten(2).mean(2).double().cpu())
    size, *errors = squares
    weight = torch.exp(-torch.logit(t.double()).square() / 2)
    return [
        ((error / size).sqrt().tolist(), float(((weight * error).sum() / (weight * size).sum()).sqrt()))
        for error in errors
    ]


def sample_errors(model: DiT, modulations: list[Modulation], latents: Tensor) -> list[float]:
    """Relative root-mean-square difference from stage 1's own pictures, of the size of `latents`, same noise."""
    count, parts = min(SAMPLES, len(latents)), 1 + len(modulations)
    state = torch.randn(latents[:count].shape, generator=torch.Generator().manual_seed(0)).to(latents.device)
    state = state.repeat(parts, 1, 1, 1)
    times = torch.arange(SAMPLE_STEPS, device=latents.device) / SAMPLE_STEPS
    by_time = tables(model, [None, *modulations], times)
    for step, t in enumerate(times):
        rows = by_time[:, :, step, None].expand(-1, -1, count, -1)
        state = state + velocities(model, rows, state, t.expand(count)).flatten(0, 1) / SAMPLE_STEPS
    wanted, *got = state.unflatten(0, (parts, count))
    return [relative_error(pictures, wanted) for pictures in got]


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
