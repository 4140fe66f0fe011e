"""A shared modulation in place of every block's own: adaLN-zero becomes adaLN-single (PixArt-alpha, section 2.3).

Block i's modulation without a class, S_i(t), is replaced by f(t) + E_i. The paper takes f = S_0 and matches one t,
which is exact there and wrong elsewhere. Fitted, per channel: S_i(t) + o = s_i f(t) + u_i, with o = 1 for gamma and
0 otherwise. Then E_i = u_i / s_i - o, and s_i goes into the neighbouring weights: for gates into the rows of the
linear before, for (1 + gamma, beta), which share one s, into the columns of the linears that read them.

Shapes: T nodes of t, D width; a modulation has 6 chunks of D: gamma1, beta1, gamma2, beta2, alpha1, alpha2.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conversion.batches import at_once
from pixart.model.dit import DiT, null_labels
from pixart.model.rectified_flow import interpolate

PAPER_T = 0.5
NODES = 12
NODE_SPAN = 2.5  # standard deviations of the logit of t that the nodes reach on either side
RIDGE = 1e-5  # of the largest squared singular value
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


def constants(width: int) -> Tensor:
    """o: what a block adds to its modulation -> (6 D,)."""
    one = torch.zeros(6, width)
    one[[CHUNK["gamma1"], CHUNK["gamma2"]]] = 1
    return one.flatten()


def evaluate(modulation: Modulation, hidden: Tensor) -> Tensor:
    """What takes the place of every block's modulation; hidden (T, D) is block 0's layer before -> (blocks, T, 6 D)."""
    weight, bias, offsets, scales = (getattr(modulation, field.name).to(hidden) for field in fields(modulation))
    one = constants(hidden.shape[-1]).to(hidden)
    return scales[:, None] * (F.linear(hidden, weight, bias) + offsets[:, None] + one) - one


@torch.no_grad()
def tables(model: DiT, modulations: Sequence[Modulation | None], t: Tensor) -> Tensor:
    """What each of M modulations is at every t (T,), stage 1's own for None -> (M, blocks, T, 6 D)."""
    own, hidden = own_modulations(model, t, torch.float32)
    return torch.stack([own if m is None else evaluate(m, hidden) for m in modulations])


@contextmanager
def modulated(model: DiT, rows: Tensor) -> Iterator[None]:
    """Stage 1 with these modulations in place of every block's own, an image a row; rows (blocks, B, 6 D).

    With `evaluate`'s it computes what stage 2 does, whose weights have absorbed s, before any text.
    """
    for block, own in zip(model.dit_blocks, rows, strict=True):
        block.modulation = partial(lambda own, condition: own, own)
    try:
        yield
    finally:
        for block in model.dit_blocks:
            del block.modulation


def nodes_of_t() -> tuple[Tensor, Tensor]:
    """Values of t and their weights under its training distribution -> (T,), (T,), float64."""
    logit = torch.linspace(-NODE_SPAN, NODE_SPAN, NODES, dtype=torch.float64)
    density = torch.exp(-logit.square() / 2)
    return logit.sigmoid(), density / density.sum()


@torch.no_grad()
def own_modulations(model: DiT, t: Tensor, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Every block's modulation without a class (blocks, T, 6 D), and block 0's layer before it (T, D)."""
    device = model.adaLN1.weight.device
    condition = model.embed_condition(t.float().to(device), null_labels(model, len(t), device)).to(dtype)
    hidden = [F.silu(linear(condition, block.adaLN1)) for block in model.dit_blocks]
    outputs = [linear(h, block.adaLN2) for h, block in zip(hidden, model.dit_blocks, strict=True)]
    return torch.stack(outputs), hidden[0]


def linear(x: Tensor, layer: nn.Linear) -> Tensor:
    return F.linear(x, layer.weight.to(x), layer.bias.to(x))


def silent(model: DiT, count: int, device: torch.device) -> dict[str, Tensor]:
    """No class in stage 1; in stage 2 a text that says nothing, as cross-attention begins with an output of zero."""
    if model.stage == 1:
        return {"label": null_labels(model, count, device)}
    mask = torch.ones(count, 1, dtype=torch.bool, device=device)
    return {"text": torch.zeros(count, 1, model.config.text_dim, device=device), "text_mask": mask}


@torch.no_grad()
def velocities(model: DiT, rows: Tensor, noised: Tensor, t: Tensor) -> Tensor:
    """Of stage 1 without a class, by M modulations each; rows (M, blocks, B, 6 D), noised (B or M B, C, h, w), t (B,).

    -> (M, B, C, h, w)
    """
    count, images = len(rows), len(t)
    noised = noised.repeat(count * images // len(noised), 1, 1, 1)
    with modulated(model, rows.transpose(0, 1).flatten(1, 2)):
        together = model(noised, t.repeat(count), **silent(model, count * images, t.device))
    return together.unflatten(0, (count, images))


@torch.enable_grad()
def sensitivity(model: DiT, latents: Tensor, seed: int = 0) -> Tensor:
    """omega = E |d(v . output) / d modulation|^2 for random v at each node of t -> (blocks, T, 6 D), float64, CPU.

    `latents` (B, C, h, w) are normalized, on the model's device.
    """
    generator = torch.Generator().manual_seed(seed)
    captured: list[Tensor] = []

    def capture(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        captured.append(output.detach().requires_grad_())
        return captured[-1]

    handles = [block.adaLN2.register_forward_hook(capture) for block in model.dit_blocks]
    model.requires_grad_(False)
    omega = []
    for values in nodes_of_t()[0].float().split(at_once(model, latents)):
        count = len(values)
        t = values.repeat_interleave(len(latents)).to(latents.device)
        noise = torch.randn((count, *latents.shape), generator=generator).flatten(0, 1).to(latents.device)
        noised = interpolate(latents.repeat(count, 1, 1, 1), noise, t)
        output = model(noised, t, **silent(model, len(t), latents.device))
        probe = torch.randn(output.shape, generator=generator).to(output)
        gradients = torch.autograd.grad((output * probe).sum(), captured)
        omega.append(torch.stack([g.double().square().unflatten(0, (count, -1)).mean(1).cpu() for g in gradients]))
        captured.clear()
    for handle in handles:
        handle.remove()
    return torch.cat(omega, dim=1)


def paper(model: DiT) -> Modulation:
    """f is block 0's modulation, E_i = S_i(t*) - f(t*) at t* = 0.5."""
    targets = own_modulations(model, torch.tensor([PAPER_T]))[0].cpu()
    first = model.dit_blocks[0].adaLN2
    return Modulation(
        weight=first.weight.detach().cpu(),
        bias=first.bias.detach().cpu(),
        offsets=(targets[:, 0] - targets[0, 0]).float(),
        scales=torch.ones_like(targets[:, 0]).float(),
    )


class Fit:
    """Signed per-channel scales by alternating least squares, weighted by sensitivity (blocks, T, 6 D); in float64."""

    def __init__(self, model: DiT, omega: Tensor) -> None:
        t, density = nodes_of_t()
        targets, self.hidden = (found.cpu() for found in own_modulations(model, t))  # (blocks, T, 6 D), (T, D)
        self.one = constants(model.config.dim).double()
        self.targets = targets + self.one
        self.trust = density[:, None] * omega.clamp(min=omega.mean() * 1e-6)
        first = model.dit_blocks[0].adaLN2
        self.weight, self.bias = (tensor.detach().double().cpu() for tensor in (first.weight, first.bias))

    def modulation(self, rounds: int, max_scale: float, scales: Tensor | None = None) -> Modulation:
        """With `scales` given only f and E are fitted: the average of the weights must share its scales with them."""
        blocks, nodes, width = self.targets.shape
        shared = self.targets[0]  # f (T, 6 D)
        s = torch.ones(blocks, width, dtype=torch.float64) if scales is None else scales.double()
        for _ in range(rounds):
            if scales is None:
                s = fit_scales(shared, self.targets, self.trust, max_scale)
            u = weighted_mean(self.targets - s[:, None] * shared, self.trust)
            scaled = self.trust * s[:, None]
            shared = (scaled * (self.targets - u)).sum(0) / (scaled * s[:, None]).sum(0)

        # Realize f in the last layer of block 0's MLP: ridge on the change of its weights and bias.
        residual = shared - F.linear(self.hidden, self.weight, self.bias)  # (T, 6 D)
        features = torch.cat([self.hidden, torch.ones(nodes, 1, dtype=torch.float64)], dim=1)  # (T, D + 1)
        kernel = features @ features.t()
        ridge = RIDGE * torch.linalg.eigvalsh(kernel)[-1] * torch.eye(nodes, dtype=torch.float64)
        change = torch.linalg.solve(kernel + ridge, residual).t() @ features  # (6 D, D + 1)
        realized = shared - residual + features @ change.t()
        u = weighted_mean(self.targets - s[:, None] * realized, self.trust)[:, 0]
        return Modulation(
            weight=(self.weight + change[:, :-1]).float(),
            bias=(self.bias + change[:, -1]).float(),
            offsets=(u / s - self.one).float(),
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
