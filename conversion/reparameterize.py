"""Stage 1 to stage 2: adaLN-zero of every block becomes one shared modulation (PixArt-alpha, section 2.3).

Block i's modulation without a class, S_i(t), is replaced by f(t) + E_i. The paper takes f = S_0 and matches one t,
which is exact there and wrong elsewhere. Fitted, per channel: S_i(t) + o = s_i f(t) + u_i, with o = 1 for gamma and
0 otherwise. Then E_i = u_i / s_i - o, and s_i goes into the neighbouring weights: for gates into the rows of the
linear before, for (1 + gamma, beta), which share one s, into the columns of the linears that read them.

Shapes: T nodes of t, D width; a modulation has 6 chunks of D: gamma1, beta1, gamma2, beta2, alpha1, alpha2.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pixart.checkpoint import Checkpoint, State
from pixart.model.dit import DiT, no_class
from pixart.model.flow import interpolate, stratified_time
from pixart.training.optimizer import MOMENTS

Way = Literal["paper", "fitted"]
WAYS: tuple[Way, ...] = ("paper", "fitted")

PAPER_T = 0.5
FIT_IMAGES = 32
NODES = 16
NODE_SPAN = 2.5  # standard deviations of the logit of t that the nodes reach on either side
RIDGE = 1e-5  # of the largest squared singular value
# The fit minimizes errors channel by channel, but those of all blocks add up in the output: more rounds of it can make
# the output worse. So these are tried, |s| within [1 / max_scale, max_scale], and the output's error decides.
ROUNDS = (1, 2, 4, 10)
MAX_SCALES = (4.0, 16.0)
CHUNK = {"gamma1": 0, "beta1": 1, "gamma2": 2, "beta2": 3, "alpha1": 4, "alpha2": 5}
# A scale's two chunks, or the gate's one, with the weights that absorb it: along rows (0) or columns (1).
ATTENTION, MLP = "attention.attention", "mlp"
ABSORBED: tuple[tuple[tuple[str, ...], tuple[tuple[str, int], ...]], ...] = (
    (("gamma1", "beta1"), tuple((f"{ATTENTION}.{name}.weight", 1) for name in ("q_proj", "k_proj", "v_proj"))),
    (("gamma2", "beta2"), ((f"{MLP}.linear1.weight", 1),)),
    (("alpha1",), ((f"{ATTENTION}.out_proj.weight", 0), (f"{ATTENTION}.out_proj.bias", 0))),
    (("alpha2",), ((f"{MLP}.linear2.weight", 0), (f"{MLP}.linear2.bias", 0))),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Modulation:
    """A shared modulation in place of every block's own."""

    weight: Tensor  # (6 D, D) of the shared MLP, whose first layer is block 0's
    bias: Tensor  # (6 D,)
    offsets: Tensor  # E (blocks, 6 D)
    scales: Tensor  # s (blocks, 6 D)


def nodes_of_t() -> tuple[Tensor, Tensor]:
    """Values of t and their weights under its training distribution -> (T,), (T,), float64."""
    logit = torch.linspace(-NODE_SPAN, NODE_SPAN, NODES, dtype=torch.float64)
    density = torch.exp(-logit.square() / 2)
    return logit.sigmoid(), density / density.sum()


@torch.no_grad()
def modulations(model: DiT, t: Tensor) -> tuple[Tensor, Tensor]:
    """Every block's modulation without a class (blocks, T, 6 D), and block 0's hidden layer (T, D); float64."""
    condition = model.condition(t.float(), no_class(model, len(t))).double()
    hidden = [linear(condition, block.adaLN1) for block in model.dit_blocks]
    outputs = [linear(F.silu(h), block.adaLN2) for h, block in zip(hidden, model.dit_blocks, strict=True)]
    return torch.stack(outputs), F.silu(hidden[0])


def linear(x: Tensor, layer: torch.nn.Linear) -> Tensor:
    return F.linear(x, layer.weight.to(x), layer.bias.to(x))


def sensitivity(model: DiT, latents: Tensor, seed: int = 0) -> Tensor:
    """omega = E |d(v . output) / d modulation|^2 for random v at each node of t -> (blocks, T, 6 D).

    `latents` (B, C, h, w) are normalized.
    """
    generator = torch.Generator().manual_seed(seed)
    captured: list[Tensor] = []

    def capture(module: torch.nn.Module, inputs: object, output: Tensor) -> None:
        output.retain_grad()
        captured.append(output)

    handles = [block.adaLN2.register_forward_hook(capture) for block in model.dit_blocks]
    omega = []
    for value in nodes_of_t()[0].float():
        t = value.expand(len(latents))
        noised = interpolate(latents, torch.randn(latents.shape, generator=generator), t)
        output = model(noised, t, label=no_class(model, len(latents)))
        (output * torch.randn(output.shape, generator=generator)).sum().backward()
        omega.append(torch.stack([modulation.grad.double().square().mean(0) for modulation in captured]))
        captured.clear()
    for handle in handles:
        handle.remove()
    model.zero_grad(set_to_none=True)
    return torch.stack(omega, dim=1)


def paper(model: DiT) -> Modulation:
    """f is block 0's modulation, E_i = S_i(t*) - f(t*) at t* = 0.5."""
    targets, _ = modulations(model, torch.tensor([PAPER_T]))
    first = model.dit_blocks[0].adaLN2
    return Modulation(
        weight=first.weight.detach().clone(),
        bias=first.bias.detach().clone(),
        offsets=(targets[:, 0] - targets[0, 0]).float(),
        scales=torch.ones_like(targets[:, 0]).float(),
    )


def fitted(model: DiT, omega: Tensor, *, rounds: int, max_scale: float, scales: Tensor | None = None) -> Modulation:
    """Signed per-channel scales by alternating least squares, weighted by sensitivity (blocks, T, 6 D); in float64.

    With `scales` given only f and E are fitted: the average of the weights must share its scales with them.
    """
    t, density = nodes_of_t()
    targets, hidden = modulations(model, t)  # (blocks, T, 6 D), (T, D)
    blocks, nodes, width = targets.shape
    one = torch.zeros(6, width // 6, dtype=torch.float64)
    one[[CHUNK["gamma1"], CHUNK["gamma2"]]] = 1
    targets = targets + one.flatten()
    weight = density[:, None] * omega.clamp(min=omega.mean() * 1e-6)

    shared = targets[0]  # f (T, 6 D)
    s = torch.ones(blocks, width, dtype=torch.float64) if scales is None else scales.double()
    for _ in range(rounds):
        if scales is None:
            s = fit_scales(shared, targets, weight, max_scale)
        u = weighted_mean(targets - s[:, None] * shared, weight)
        scaled = weight * s[:, None]
        shared = (scaled * (targets - u)).sum(0) / (scaled * s[:, None]).sum(0)

    # Realize f in the last layer of block 0's MLP: ridge on the change of its weights and bias.
    first = model.dit_blocks[0].adaLN2
    residual = shared - linear(hidden, first)  # (T, 6 D)
    features = torch.cat([hidden, torch.ones(nodes, 1, dtype=torch.float64)], dim=1)  # (T, D + 1)
    kernel = features @ features.t()
    ridge = RIDGE * torch.linalg.eigvalsh(kernel)[-1] * torch.eye(nodes, dtype=torch.float64)
    change = torch.linalg.solve(kernel + ridge, residual).t() @ features  # (6 D, D + 1)
    realized = linear(hidden, first) + features @ change.t()
    u = weighted_mean(targets - s[:, None] * realized, weight)[:, 0]
    return Modulation(
        weight=(first.weight.detach().double() + change[:, :-1]).float(),
        bias=(first.bias.detach().double() + change[:, -1]).float(),
        offsets=(u / s - one.flatten()).float(),
        scales=s.float(),
    )


def weighted_mean(values: Tensor, weight: Tensor) -> Tensor:  # (blocks, T, 6 D) -> (blocks, 1, 6 D)
    return (weight * values).sum(1, keepdim=True) / weight.sum(1, keepdim=True)


def fit_scales(shared: Tensor, targets: Tensor, weight: Tensor, max_scale: float) -> Tensor:
    """s = sum W f~ S~ / sum W f~^2 over t and over the chunks that share it, f~ and S~ without their W-mean over t."""
    centred = shared - weighted_mean(shared.expand_as(weight), weight)  # (blocks, T, 6 D)
    moving = targets - weighted_mean(targets, weight)
    blocks = len(targets)
    numerator = (weight * centred * moving).sum(1).view(blocks, 6, -1)
    denominator = (weight * centred.square()).sum(1).view(blocks, 6, -1)
    s = torch.empty_like(numerator)
    for chunks, _ in ABSORBED:
        index = [CHUNK[name] for name in chunks]
        ratio = numerator[:, index].sum(1) / denominator[:, index].sum(1).clamp(min=1e-30)
        sign = torch.where(ratio < 0, -1.0, 1.0)
        s[:, index] = (sign * ratio.abs().clamp(1 / max_scale, max_scale))[:, None]
    return s.flatten(1)


def stage2_config(config: dict, text_dim: int) -> dict:
    return {**{key: value for key, value in config.items() if key != "num_classes"}, "text_dim": text_dim}


def stage2_state(model: DiT, modulation: Modulation, fresh: State) -> State:
    """Stage-2 tensors from a stage-1 model; `fresh` gives those that stage 1 has nothing for."""
    source = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    state = {name: source.get(name, tensor).clone() for name, tensor in fresh.items()}
    none = source["cond_proj.weight"][-1].double()
    first = "dit_blocks.0.adaLN1"
    for target, origin in (("adaLN1", "adaLN1"), ("adaLN1_single", first)):
        state[f"{target}.weight"] = source[f"{origin}.weight"].clone()
        baked = source[f"{origin}.bias"].double() + source[f"{origin}.weight"].double() @ none
        state[f"{target}.bias"] = baked.float()
    state["adaLN2_single.weight"] = modulation.weight
    state["adaLN2_single.bias"] = modulation.bias
    for index in range(len(model.dit_blocks)):
        state[f"dit_blocks.{index}.adaLNembed"] = modulation.offsets[index]
        for name, scale in absorbed_scales(index, modulation.scales[index]):
            state[name] = state[name] * scale
    return state


def absorbed_scales(block: int, scales: Tensor) -> list[tuple[str, Tensor]]:
    """Each parameter of a block that absorbs scales (6 D,), with what it is multiplied by, ready to broadcast."""
    chunks = scales.view(6, -1)
    found = []
    for names, parameters in ABSORBED:
        scale = chunks[CHUNK[names[0]]]
        for name, axis in parameters:
            rows_of_matrix = axis == 0 and name.endswith("weight")
            found.append((f"dit_blocks.{block}.{name}", scale[:, None] if rows_of_matrix else scale))
    return found


def to_stage2(source: Checkpoint, way: Way, text_dim: int, latents: Tensor) -> tuple[Checkpoint, dict[str, str]]:
    """A whole stage-1 training state as one of stage 2, and the fate of every tensor: carried, derived or new.

    `latents` (B, C, h, w), normalized, weigh the channels of the fit. The average of the weights takes the weights'
    scales, so that it remains their average. Moments follow their weights (W' = s W: m / s, v / s^2); those of
    tensors that changed their meaning start at zero, with a step count of their own.
    """
    model, average = (load_model(source.config, state) for state in (source.model, source.ema))
    config = stage2_config(source.config, text_dim)
    torch.manual_seed(0)
    fresh = DiT(**config).state_dict()
    if way == "paper":
        own, averaged = paper(model), paper(average)
    else:
        own, averaged = best_fit(model, average, latents[:FIT_IMAGES], fresh)

    absorbed = dict(
        pair for index in range(len(model.dit_blocks)) for pair in absorbed_scales(index, own.scales[index])
    )
    fates, optimizer = {}, {}
    for name in DiT(**config).state_dict():
        is_new = name not in source.model or name == "adaLN1.bias"
        fates[name] = "derived" if name in absorbed and way != "paper" else "carried"
        if is_new:
            fates[name] = "new" if "cross_attention" in name else "derived"
        if f"{name}.step" not in source.optimizer and not is_new:
            continue  # a buffer
        for moment, power in zip(MOMENTS, (1, 2), strict=True):
            if is_new:
                optimizer[f"{name}.{moment}"] = torch.zeros_like(fresh[name])
            else:
                divisor = absorbed[name] ** power if fates[name] == "derived" else 1
                optimizer[f"{name}.{moment}"] = source.optimizer[f"{name}.{moment}"] / divisor
        optimizer[f"{name}.step"] = torch.zeros(()) if is_new else source.optimizer[f"{name}.step"].clone()
    converted = Checkpoint(
        stage=2,
        step=0,
        config=config,
        model=stage2_state(model, own, fresh),
        ema=stage2_state(average, averaged, fresh),
        optimizer=optimizer,
        normalization=source.normalization,
        dataset=source.dataset,
        provenance={**source.provenance, "reparameterization": way, "stage1_step": source.step},
    )
    return converted, fates


def best_fit(model: DiT, average: DiT, latents: Tensor, fresh: State) -> tuple[Modulation, Modulation]:
    """Of the fits by ROUNDS and MAX_SCALES the one with the smallest error of the output, and the average's with it."""
    omega = sensitivity(model, latents)
    text_dim = fresh["dit_blocks.0.cross_attention.k_proj.weight"].shape[1]
    stage2 = DiT(
        **stage2_config({key: value for key, value in model.config.items() if not key.startswith("_")}, text_dim)
    )
    best: tuple[float, Modulation, Modulation] | None = None
    for rounds, max_scale in itertools.product(ROUNDS, MAX_SCALES):
        modulation = fitted(model, omega, rounds=rounds, max_scale=max_scale)
        stage2.load_state_dict(stage2_state(model, modulation, fresh), strict=True)
        error = squared_error(model, stage2, latents)
        if best is None or error < best[0]:
            averaged = fitted(average, omega, rounds=rounds, max_scale=max_scale, scales=modulation.scales)
            best = error, modulation, averaged
    assert best is not None
    return best[1], best[2]


@torch.no_grad()
def squared_error(stage1: DiT, stage2: DiT, latents: Tensor) -> float:
    """Mean squared difference of the velocities under the training distribution of t: what it adds to the loss."""
    generator = torch.Generator().manual_seed(2)
    t = stratified_time(len(latents), generator)
    noised = interpolate(latents, torch.randn(latents.shape, generator=generator), t)
    silent = torch.zeros(len(latents), 1, stage2.config.text_dim)  # cross-attention's output is zero, whatever it reads
    got = stage2(noised, t, text=silent, text_mask=torch.ones(len(latents), 1, dtype=torch.bool))
    return float((got - stage1(noised, t, label=no_class(stage1, len(latents)))).square().mean())


def load_model(config: dict, state: State) -> DiT:
    model = DiT(**config)
    model.load_state_dict(state, strict=True)
    return model


@torch.no_grad()
def output_error(stage1: DiT, stage2: DiT, latents: Tensor, text: Tensor, mask: Tensor, t: Tensor) -> Tensor:
    """Relative root-mean-square error of stage 2's velocity against stage 1's without a class, at each t -> (T,)."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    errors = []
    for value in t.float():
        time = value.expand(len(latents))
        noised = interpolate(latents, noise, time)
        wanted = stage1(noised, time, label=no_class(stage1, len(latents)))
        got = stage2(noised, time, text=text, text_mask=mask)
        errors.append((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())
    return torch.stack(errors)
