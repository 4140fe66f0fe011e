"""Stage 1 to stage 2: adaLN-zero of every block becomes one shared modulation (PixArt-alpha, section 2.3).

Block i's modulation without a class, S_i(t), is replaced by f(t) + E_i. The paper takes f = S_0 and matches one t,
which is exact there and wrong elsewhere. Fitted, per channel: S_i(t) + o = s_i f(t) + u_i, with o = 1 for gamma and
0 otherwise. Then E_i = u_i / s_i - o, and s_i goes into the neighbouring weights: for gates into the rows of the
linear before, for (1 + gamma, beta), which share one s, into the columns of the linears that read them.

Shapes: T nodes of t, D width; a modulation has 6 chunks of D: gamma1, beta1, gamma2, beta2, alpha1, alpha2.
"""

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
NODES = 16
ROUNDS = 10
RIDGE = 1e-5  # of the largest squared singular value
MAX_SCALE = 4.0  # |s| stays in [1/4, 4]: beyond, weights and offsets degenerate
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


def nodes_of_t() -> Tensor:
    """Midpoints of equally likely parts of the training distribution of t -> (T,) float64."""
    return torch.special.ndtri((torch.arange(NODES, dtype=torch.float64) + 0.5) / NODES).sigmoid()


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
    """omega = E |d(v . output) / d modulation|^2 for random v; normalized latents (B, C, h, w) -> (blocks, 6 D)."""
    generator = torch.Generator().manual_seed(seed)
    captured: list[Tensor] = []

    def capture(module: torch.nn.Module, inputs: object, output: Tensor) -> None:
        output.retain_grad()
        captured.append(output)

    handles = [block.adaLN2.register_forward_hook(capture) for block in model.dit_blocks]
    try:
        t = stratified_time(len(latents), generator)
        noised = interpolate(latents, torch.randn(latents.shape, generator=generator), t)
        output = model(noised, t, label=no_class(model, len(latents)))
        (output * torch.randn(output.shape, generator=generator)).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
        model.zero_grad(set_to_none=True)
    return torch.stack([modulation.grad.double().square().mean(0) for modulation in captured])


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


def fitted(model: DiT, omega: Tensor, scales: Tensor | None = None) -> Modulation:
    """Signed per-channel scales by alternating least squares, weighted by sensitivity; in float64.

    With `scales` given only f and E are fitted: the average of the weights must share its scales with them.
    """
    targets, hidden = modulations(model, nodes_of_t())  # (blocks, T, 6 D), (T, D)
    blocks, nodes, width = targets.shape
    dim = width // 6
    one = torch.zeros(6, dim, dtype=torch.float64)
    one[[CHUNK["gamma1"], CHUNK["gamma2"]]] = 1
    targets = targets + one.flatten()
    weight = omega[:, None].clamp(min=omega.mean() * 1e-6)  # (blocks, 1, 6 D): t's nodes are equally likely

    shared = targets[0]
    s = torch.ones(blocks, width, dtype=torch.float64) if scales is None else scales.double()
    for _ in range(ROUNDS):
        if scales is None:
            s = fit_scales(shared, targets, weight)
        u = (targets - s[:, None] * shared).mean(1)
        scaled = weight * s[:, None]
        shared = (scaled * (targets - u[:, None])).sum(0) / (scaled * s[:, None]).sum(0)

    # Realize f in the last layer of block 0's MLP: ridge on the change of its weights and bias.
    first = model.dit_blocks[0].adaLN2
    residual = shared - linear(hidden, first)  # (T, 6 D)
    features = torch.cat([hidden, torch.ones(nodes, 1, dtype=torch.float64)], dim=1)  # (T, D + 1)
    kernel = features @ features.t()
    ridge = RIDGE * torch.linalg.eigvalsh(kernel)[-1] * torch.eye(nodes, dtype=torch.float64)
    change = torch.linalg.solve(kernel + ridge, residual).t() @ features  # (6 D, D + 1)
    realized = linear(hidden, first) + features @ change.t()
    u = (targets - s[:, None] * realized).mean(1)
    return Modulation(
        weight=(first.weight.detach().double() + change[:, :-1]).float(),
        bias=(first.bias.detach().double() + change[:, -1]).float(),
        offsets=(u / s - one.flatten()).float(),
        scales=s.float(),
    )


def fit_scales(shared: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """s = sum W f~ S~ / sum W f~^2 over t and over the chunks that share it, f~ and S~ without their mean over t."""
    centred = shared - shared.mean(0)  # (T, 6 D)
    moving = targets - targets.mean(1, keepdim=True)  # (blocks, T, 6 D)
    blocks = len(targets)
    numerator = (weight * centred * moving).sum(1).view(blocks, 6, -1)
    denominator = (weight * centred.square()).sum(1).view(blocks, 6, -1)
    s = torch.empty_like(numerator)
    for chunks, _ in ABSORBED:
        index = [CHUNK[name] for name in chunks]
        ratio = numerator[:, index].sum(1) / denominator[:, index].sum(1).clamp(min=1e-30)
        sign = torch.where(ratio < 0, -1.0, 1.0)
        s[:, index] = (sign * ratio.abs().clamp(1 / MAX_SCALE, MAX_SCALE))[:, None]
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
        omega = sensitivity(model, latents)
        own = fitted(model, omega)
        averaged = fitted(average, omega, scales=own.scales)

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
