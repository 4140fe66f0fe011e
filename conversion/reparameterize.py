"""Stage 1 to stage 2: a whole training state, with the shared modulation that `modulation` finds.

Everything that both stages have is copied. The class is frozen to "no class" and baked into biases; scales of the
modulation go into the weights beside it, and their moments follow (W' = s W: m / s, v / s^2). Cross-attention begins
at zero, so that stage 2 says what stage 1 says whatever the text is.
"""

import functools
import hashlib
import itertools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from conversion import distill
from conversion.modulation import NODES, Fit, Modulation, absorbed_scales, paper, sensitivity, silent
from conversion.options import Way
from pixart.checkpoint import Checkpoint, Lazy, State
from pixart.model.dit import DiT, load_model, state_shapes
from pixart.model.flow import interpolate, stratified_time
from pixart.sampling import sample
from pixart.training.optimizer import MOMENTS

# The fit minimizes errors channel by channel, but those of all blocks add up in the output: more rounds of it can make
# the output worse. So these are tried, |s| within [1 / max_scale, max_scale], and the output's error decides.
ROUNDS = (1, 2, 4, 10)
MAX_SCALES = (4.0, 16.0)
CHOICE_IMAGES = 4  # at the least
IMAGES = 32  # at the most, of whatever is measured here
OPERATIONS = {"cpu": 3e11, "cuda": 1e14}  # that a measurement may take: beyond them, fewer and smaller images
SMALLEST_GRID = 4
SAMPLES = 4
SAMPLE_STEPS = 20


def to_stage2(source: Checkpoint, modulation: Modulation, average: Modulation, text_dim: int) -> Checkpoint:
    """The training state with the modulations of its weights and of their average, tensors made when asked for."""
    config = stage2_config(source.config, text_dim)
    return Checkpoint(
        stage=2,
        step=0,
        config=config,
        model=stage2_tensors(source.model, config, modulation),
        ema=stage2_tensors(source.ema, config, average),
        optimizer=stage2_moments(source, config, modulation),
        normalization=source.normalization,
        dataset=source.dataset,
        provenance={**source.provenance, "stage1_step": source.step},
    )


def stage2_config(config: Mapping, text_dim: int) -> dict:
    return {**{key: value for key, value in config.items() if key != "num_classes"}, "text_dim": text_dim}


def fates(source: Checkpoint, config: Mapping, modulation: Modulation) -> dict[str, str]:
    """What becomes of each tensor, and so of its average and moments: carried, derived or new."""
    changed = {
        name
        for block, scales in enumerate(modulation.scales)
        for name, scale in absorbed_scales(block, scales)
        if (scale != 1).any()
    }
    found = {}
    for name in state_shapes(config):
        is_derived = name in changed or name == "adaLN1.bias" or "_single" in name or name.endswith("adaLNembed")
        found[name] = "derived" if is_derived else "carried" if name in source.model else "new"
    return found


def stage2_tensors(source: State, config: Mapping, modulation: Modulation) -> Lazy:
    none, first = source["cond_proj.weight"][-1].double(), "dit_blocks.0.adaLN1"

    def baked(layer: str) -> Tensor:
        return (source[f"{layer}.bias"].double() + source[f"{layer}.weight"].double() @ none).float()

    makers: dict[str, Callable[[], Tensor]] = {}
    for name, shape in state_shapes(config).items():
        makers[name] = functools.partial(
            source.__getitem__ if name in source else functools.partial(fresh, shape), name
        )
    for block, scales in enumerate(modulation.scales):
        makers[f"dit_blocks.{block}.adaLNembed"] = functools.partial(modulation.offsets.__getitem__, block)
        for name, scale in absorbed_scales(block, scales):
            if (scale != 1).any():
                makers[name] = functools.partial(lambda name, scale: source[name] * scale, name, scale)
    makers |= {
        "adaLN1.bias": lambda: baked("adaLN1"),
        "adaLN1_single.weight": lambda: source[f"{first}.weight"],
        "adaLN1_single.bias": lambda: baked(first),
        "adaLN2_single.weight": lambda: modulation.weight,
        "adaLN2_single.bias": lambda: modulation.bias,
    }
    return Lazy(makers)


def fresh(shape: tuple[int, ...], name: str) -> Tensor:
    """A tensor of cross-attention that stage 1 has nothing for, as `DiT.initialize` begins it; the same every time."""
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    tensor = torch.zeros(shape)
    if name.endswith("weight") and "out_proj" not in name:
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7])
        nn.init.xavier_uniform_(tensor, generator=torch.Generator().manual_seed(seed))
    return tensor


def stage2_moments(source: Checkpoint, config: Mapping, modulation: Modulation) -> Lazy:
    """Carried with what is carried, scaled with what is scaled; zero, with a step count of their own, for the rest."""
    absorbed = dict(pair for block, scales in enumerate(modulation.scales) for pair in absorbed_scales(block, scales))
    old = source.optimizer
    makers: dict[str, Callable[[], Tensor]] = {}
    for name, shape in state_shapes(config).items():
        known = f"{name}.step" in old and name != "adaLN1.bias"
        if not known and name in source.model and name != "adaLN1.bias":
            continue  # a buffer
        for moment, power in zip(MOMENTS, (1, 2), strict=True):
            key = f"{name}.{moment}"
            if not known:
                makers[key] = functools.partial(torch.zeros, shape)
            elif name in absorbed and (absorbed[name] != 1).any():
                divisor = absorbed[name] ** power
                makers[key] = functools.partial(lambda key, divisor: old[key] / divisor, key, divisor)
            else:
                makers[key] = functools.partial(old.__getitem__, key)
        makers[f"{name}.step"] = (
            functools.partial(old.__getitem__, f"{name}.step") if known else lambda: torch.zeros(())
        )
    return Lazy(makers)


def find_modulations(
    source: Checkpoint, way: Way, text_dim: int, latents: Tensor, device: torch.device | str = "cpu"
) -> tuple[Modulation, Modulation]:
    """Of the weights and of their average, which shares its scales with them, so that it remains their average.

    `latents` (B, C, h, w), normalized, weigh the channels of the fit: as many of them as take some seconds.
    """
    model = load_model(source.config, source.model, device)
    if way == "paper":
        return paper(model), paper(load_model(source.config, source.ema, device))
    omega = sensitivity(model, affordable(model, latents, passes=3 * NODES).to(device))
    config = stage2_config(source.config, text_dim)

    def stage2(state: State, modulation: Modulation) -> DiT:
        return load_model(config, stage2_tensors(state, config, modulation), device)

    fit, candidates = Fit(model, omega), list(itertools.product(ROUNDS, MAX_SCALES))
    noised, t = at_training_times(
        affordable(model, latents, passes=1 + len(candidates), least=CHOICE_IMAGES).to(device)
    )
    wanted = velocity(model, noised, t)
    best: tuple[float, int, float, Modulation] | None = None
    for rounds, max_scale in candidates:
        modulation = fit.modulation(rounds, max_scale)
        got = velocity(stage2(source.model, modulation), noised, t)
        error = float((got - wanted).square().mean())  # what it adds to the loss
        if best is None or error < best[0]:
            best = error, rounds, max_scale, modulation
    assert best is not None
    _, rounds, max_scale, own = best
    latents = affordable(model, latents, passes=4 * distill.STEPS, least=CHOICE_IMAGES).to(device)
    if way == "distilled":
        own = distill.distilled(model, stage2(source.model, own), own, latents, free_scales=True)
    del model, fit
    average = load_model(source.config, source.ema, device)
    averaged = Fit(average, omega).modulation(rounds, max_scale, own.scales)
    if way == "distilled":
        averaged = distill.distilled(average, stage2(source.ema, averaged), averaged, latents, free_scales=False)
    return own, averaged


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


@torch.no_grad()
def velocity(model: DiT, noised: Tensor, t: Tensor) -> Tensor:
    return model(noised, t, **silent(model, len(t), t.device))


def output_error(stage1: DiT, stage2: DiT, latents: Tensor, t: Tensor) -> tuple[list[float], float]:
    """Relative root-mean-square error of stage 2's velocity at each t (T,), and under t's training distribution.

    For the latter, t must be at equal distances of its logit.
    """
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)).to(latents.device)
    squares = []
    for value in t.float():
        time = value.expand(len(latents)).to(latents.device)
        noised = interpolate(latents, noise, time)
        wanted, got = velocity(stage1, noised, time), velocity(stage2, noised, time)
        squares.append(torch.stack([(got - wanted).square().mean(), wanted.square().mean()]))
    errors, sizes = torch.stack(squares).double().cpu().unbind(1)
    weight = torch.exp(-torch.logit(t.double()).square() / 2)
    return (errors / sizes).sqrt().tolist(), float(((weight * errors).sum() / (weight * sizes).sum()).sqrt())


def samples(model: DiT, latents: Tensor) -> Tensor:
    """At most SAMPLES latents of pictures, of the size of `latents`, after SAMPLE_STEPS steps from the same noise."""
    count, device = min(SAMPLES, len(latents)), latents.device
    condition, side = silent(model, count, device), latents.shape[-1]
    return sample(model, condition, condition, side=side, steps=SAMPLE_STEPS, guidance=1, seed=0)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
