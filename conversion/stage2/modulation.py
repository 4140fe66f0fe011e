"""Fit of one shared modulation in place of a modulation per block: adaLN-zero becomes adaLN-single.

PixArt-alpha (arXiv 2310.00426), section 2.3, replaces block i's modulation with the null class, S_i(t), by f(t) + E_i,
where f = S_0 and E_i matches S_i at one t; the result is exact at that t and wrong elsewhere. The fit approximates it
for all t, per channel: S_i(t) + o = s_i f(t) + u_i, with o = 1 for gamma and 0 otherwise. Then E_i = u_i / s_i - o, and
s_i is absorbed by neighbouring weights: the scale of alpha by the rows of the linear before it, the common scale of
(1 + gamma) and beta by the columns of the linears that read them.

Shapes: T nodes of t, width D; a modulation has 6 chunks of D: gamma1, beta1, gamma2, beta2, alpha1, alpha2.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conversion.batches import batches_per_pass
from pixart.model.dit import DiT, null_labels
from pixart.model.rectified_flow import interpolate

PAPER_T = 0.5
NUM_NODES = 12
# Time embeddings of frequencies up to 1 are smooth in t; with frequencies up to 1,000, as the JAX training has them, 12
# nodes leave out what lies between them.
MANY_NODES, SMOOTH_FREQUENCY = 48, 10.0  # radians per unit of t
NODE_SPAN = 2.5  # the nodes cover this many standard deviations of the logit of t on either side
RIDGE = 1e-5  # relative to the largest squared singular value
CHUNK = {"gamma1": 0, "beta1": 1, "gamma2": 2, "beta2": 3, "alpha1": 4, "alpha2": 5}
# The chunks that share a scale, and the parameters that absorb it, along rows (axis 0) or columns (axis 1).
ATTENTION, MLP = "attention.attention", "mlp"
ABSORBED: tuple[tuple[tuple[str, ...], tuple[tuple[str, int], ...]], ...] = (
    (("gamma1", "beta1"), tuple((f"{ATTENTION}.{name}.weight", 1) for name in ("q_proj", "k_proj", "v_proj"))),
    (("gamma2", "beta2"), ((f"{MLP}.linear1.weight", 1),)),
    (("alpha1",), ((f"{ATTENTION}.out_proj.weight", 0), (f"{ATTENTION}.out_proj.bias", 0))),
    (("alpha2",), ((f"{MLP}.linear2.weight", 0), (f"{MLP}.linear2.bias", 0))),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Modulation:
    """Parameters of a shared modulation with a scale and an offset per block."""

    weight: Tensor  # (6 D, D), last layer of the shared MLP; its first layer is block 0's
    bias: Tensor  # (6 D,)
    offsets: Tensor  # E (blocks, 6 D)
    scales: Tensor  # s (blocks, 6 D)


def constant_terms(width: int) -> Tensor:
    """Return o, the constant that a block adds to each channel of its modulation -> (6 D,)."""
    constants = torch.zeros(6, width)
    constants[[CHUNK["gamma1"], CHUNK["gamma2"]]] = 1
    return constants.flatten()


def rescaled_modulations(modulation: Modulation, hidden: Tensor) -> Tensor:
    """Return s (f + E + o) - o of every block: the stage-1 modulations that are equivalent to `modulation`.

    `hidden` (T, D) is the activation before the last layer of the shared MLP -> (blocks, T, 6 D).
    """
    weight, bias, offsets, scales = (getattr(modulation, field.name).to(hidden) for field in fields(modulation))
    constants = constant_terms(hidden.shape[-1]).to(hidden)
    return scales[:, None] * (F.linear(hidden, weight, bias) + offsets[:, None] + constants) - constants


@torch.no_grad()
def tabulate(model: DiT, modulations: Sequence[Modulation | None], t: Tensor) -> Tensor:
    """Evaluate M modulations at every t (T,), None standing for stage 1's modulations -> (M, blocks, T, 6 D)."""
    exact, hidden = block_modulations(model, t, torch.float32)
    return torch.stack([exact if m is None else rescaled_modulations(m, hidden) for m in modulations])


@contextmanager
def override_modulations(model: DiT, rows: Tensor) -> Iterator[None]:
    """Replace the blocks' modulations of a stage-1 model by `rows` (blocks, B, 6 D), one row per image.

    With the rows of `rescaled_modulations` the model computes what the stage-2 model computes, whose weights have
    absorbed s and whose cross-attention is still zero.
    """
    for block, block_rows in zip(model.blocks, rows, strict=True):
        block.modulation = partial(lambda block_rows, condition: block_rows, block_rows)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in model.blocks:
            del block.modulation


def num_nodes(model: DiT) -> int:
    """Return the number of nodes of t that resolve the model's time embedding."""
    return NUM_NODES if float(model.time_proj.freqs.max()) <= SMOOTH_FREQUENCY else MANY_NODES


def quadrature_nodes(model: DiT) -> tuple[Tensor, Tensor]:
    """Return nodes of t and their weights under the training distribution of t -> (T,), (T,), float64."""
    logit = torch.linspace(-NODE_SPAN, NODE_SPAN, num_nodes(model), dtype=torch.float64)
    density = torch.exp(-logit.square() / 2)
    return logit.sigmoid(), density / density.sum()


@torch.no_grad()
def block_modulations(model: DiT, t: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Return every block's modulation with the null class (blocks, T, 6 D) and block 0's hidden activation (T, D)."""
    device = model.adaLN1.weight.device
    condition = model.embed_condition(t.float().to(device), null_labels(model, len(t), device)).to(dtype)
    hidden = [F.silu(linear(condition, block.adaLN1)) for block in model.blocks]
    outputs = [linear(h, block.adaLN2) for h, block in zip(hidden, model.blocks, strict=True)]
    return torch.stack(outputs), hidden[0]


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight.to(x), layer.bias.to(x))


def null_condition(model: DiT, count: int, device: torch.device) -> dict[str, Tensor]:
    """Return the condition of `count` images without information: the null class in stage 1, a zero text in stage 2.

    Any text has the same effect after the conversion, because the output projection of cross-attention is zero.
    """
    if model.stage == 1:
        return {"label": null_labels(model, count, device)}
    mask = torch.ones(count, 1, dtype=torch.bool, device=device)
    return {"text": torch.zeros(count, 1, model.config.text_dim, device=device), "text_mask": mask}


@torch.no_grad()
def velocities(model: DiT, rows: Tensor, noised: Tensor, t: Tensor) -> Tensor:
    """Compute the velocities of stage 1 with the null class under each of M modulations -> (M, B, C, h, w).

    `rows` (M, blocks, B, 6 D), `noised` (B or M B, C, h, w), `t` (B,).
    """
    count, images = len(rows), len(t)
    noised = noised.repeat(count * images // len(noised), 1, 1, 1)
    with override_modulations(model, rows.transpose(0, 1).flatten(1, 2)):
        output = model(noised, t.repeat(count), **null_condition(model, count * images, t.device))
    return output.unflatten(0, (count, images))


@torch.enable_grad()
def sensitivity(model: DiT, latents: Tensor, seed: int = 0) -> Tensor:
    """Estimate omega = E |d(v . output) / d modulation|^2 over random v -> (blocks, T, 6 D), float64, on the CPU.

    `latents` (B, C, h, w) are normalized, on the model's device.
    """
    generator = torch.Generator().manual_seed(seed)
    captured: list[Tensor] = []

    def capture(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        captured.append(output.detach().requires_grad_())
        return captured[-1]

    handles = [block.adaLN2.register_forward_hook(capture) for block in model.blocks]
    model.requires_grad_(False)
    omega = []
    for nodes in quadrature_nodes(model)[0].float().split(batches_per_pass(model, latents)):
        count = len(nodes)
        t = nodes.repeat_interleave(len(latents)).to(latents.device)
        noise = torch.randn((count, *latents.shape), generator=generator).flatten(0, 1).to(latents.device)
        noised = interpolate(latents.repeat(count, 1, 1, 1), noise, t)
        output = model(noised, t, **null_condition(model, len(t), latents.device))
        probe = torch.randn(output.shape, generator=generator).to(output)
        grads = torch.autograd.grad((output * probe).sum(), captured)
        omega.append(torch.stack([g.double().square().unflatten(0, (count, -1)).mean(1).cpu() for g in grads]))
        captured.clear()
    for handle in handles:
        handle.remove()
    return torch.cat(omega, dim=1)


def paper_modulation(model: DiT) -> Modulation:
    """Return the modulation of PixArt-alpha: f is block 0's modulation, E_i = S_i(t*) - f(t*) at t* = 0.5."""
    targets = block_modulations(model, torch.tensor([PAPER_T]))[0].cpu()
    last_layer = model.blocks[0].adaLN2
    return Modulation(
        weight=last_layer.weight.detach().cpu(),
        bias=last_layer.bias.detach().cpu(),
        offsets=(targets[:, 0] - targets[0, 0]).float(),
        scales=torch.ones_like(targets[:, 0]).float(),
    )


class ModulationFit:
    """Alternating least squares for f, signed per-channel scales s and offsets u, in float64.

    Residuals are weighted by the density of t times the sensitivity `omega` (blocks, T, 6 D).
    """

    def __init__(self, model: DiT, omega: Tensor) -> None:
        t, density = quadrature_nodes(model)
        targets, self.hidden = (tensor.cpu() for tensor in block_modulations(model, t))  # (blocks, T, 6 D), (T, D)
        self.constants = constant_terms(model.config.dim).double()
        self.targets = targets + self.constants
        self.weights = density[:, None] * omega.clamp(min=omega.mean() * 1e-6)
        last_layer = model.blocks[0].adaLN2
        self.weight, self.bias = (tensor.detach().double().cpu() for tensor in (last_layer.weight, last_layer.bias))

    def solve(self, rounds: int, max_scale: float, scales: Tensor | None = None) -> Modulation:
        """Run `rounds` rounds with |s| in [1 / max_scale, max_scale], and realize f in the shared MLP's last layer.

        With `scales` (blocks, 6 D) only f and E are fitted: the EMA must have the same scales as the weights.
        """
        blocks, nodes, width = self.targets.shape
        shared = self.targets[0]  # f (T, 6 D)
        s = torch.ones(blocks, width, dtype=torch.float64) if scales is None else scales.double()
        for _ in range(rounds):
            if scales is None:
                s = fit_scales(shared, self.targets, self.weights, max_scale)
            u = weighted_mean(self.targets - s[:, None] * shared, self.weights)
            scaled = self.weights * s[:, None]
            shared = (scaled * (self.targets - u)).sum(0) / (scaled * s[:, None]).sum(0)

        # Ridge regression on the change of the weight and bias of block 0's last layer.
        residual = shared - F.linear(self.hidden, self.weight, self.bias)  # (T, 6 D)
        features = torch.cat([self.hidden, torch.ones(nodes, 1, dtype=torch.float64)], dim=1)  # (T, D + 1)
        kernel = features @ features.t()
        ridge = RIDGE * torch.linalg.eigvalsh(kernel)[-1] * torch.eye(nodes, dtype=torch.float64)
        change = torch.linalg.solve(kernel + ridge, residual).t() @ features  # (6 D, D + 1)
        realized = shared - residual + features @ change.t()
        u = weighted_mean(self.targets - s[:, None] * realized, self.weights)[:, 0]
        return Modulation(
            weight=(self.weight + change[:, :-1]).float(),
            bias=(self.bias + change[:, -1]).float(),
            offsets=(u / s - self.constants).float(),
            scales=s.float(),
        )


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:  # (blocks, T, 6 D) -> (blocks, 1, 6 D)
    return (weights * values).sum(1, keepdim=True) / weights.sum(1, keepdim=True)


def fit_scales(shared: Tensor, targets: Tensor, weights: Tensor, max_scale: float) -> Tensor:
    """Return s = sum W f~ S~ / sum W f~^2 -> (blocks, 6 D), clipped in magnitude, with its sign.

    The sums are over t and over the chunks that share a scale; f~ and S~ are centred by their W-weighted mean over t.
    """
    centred_shared = shared - weighted_mean(shared.expand_as(weights), weights)  # (blocks, T, 6 D)
    centred_targets = targets - weighted_mean(targets, weights)
    blocks = len(targets)
    numerator = (weights * centred_shared * centred_targets).sum(1).view(blocks, 6, -1)
    denominator = (weights * centred_shared.square()).sum(1).view(blocks, 6, -1)
    s = torch.empty_like(numerator)
    for chunks, _ in ABSORBED:
        index = [CHUNK[name] for name in chunks]
        ratio = numerator[:, index].sum(1) / denominator[:, index].sum(1).clamp(min=1e-30)
        sign = torch.where(ratio < 0, -1.0, 1.0)
        s[:, index] = (sign * ratio.abs().clamp(1 / max_scale, max_scale))[:, None]
    return s.flatten(1)


def absorbed_scales(block: int, scales: Tensor) -> list[tuple[str, Tensor]]:
    """Return each parameter of a block that absorbs scales (6 D,), with the factor to multiply it by, broadcastable."""
    chunks = scales.view(6, -1)
    factors = []
    for names, parameters in ABSORBED:
        scale = chunks[CHUNK[names[0]]]
        for name, axis in parameters:
            scales_rows = axis == 0 and name.endswith("weight")
            factors.append((f"dit_blocks.{block}.{name}", scale[:, None] if scales_rows else scale))
    return factors
