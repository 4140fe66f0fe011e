"""One optimizer step of the real model by each way to make it, in one run.

    python -m benchmarks.train_step [--batch 320] [--only NAME ...]       # on a GPU
    python -m benchmarks.train_step --batch 2 --blocks 2 --dim 128        # whether it runs, on a CPU

28 blocks of width 1152, 256 image tokens, 120 text states of width 2048: forward, backward, AdamW, with float32 master
weights under FSDP2 of one rank. Prints the table and writes it to `benchmarks/results/`. A way that this machine cannot
take is listed with the reason.
"""

import argparse
import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from benchmarks import measure
from conversion.calibration.plan import make_plan
from pixart.config.training import TrainConfig
from pixart.model import sdpa_autotune
from pixart.model.device_timer import seconds, wait
from pixart.model.dit import DiT
from pixart.model.flops import training_flops
from pixart.model.fp8 import fsdp_allgather, linear, scaling, torchao, transformer_engine
from pixart.training.ema import Ema
from pixart.training.fused_adamw_ema import OnePass
from pixart.training.optimizer import make_optimizer
from pixart.training.parallelize import parallelize
from pixart.training.process_group import Ranks, process_group

SIDE, CHANNELS, HEADS, TEXT, TEXT_DIM = 32, 16, 16, 120, 2048
TIMESTEPS = 1000  # of the peer's embedding
# What has to pass through memory in a block, forward and backward, however kernels are fused: reads and writes between
# products and attention, in BF16 numbers of a token's width. Norm and modulation 2 + 2, norms of q and k 4, their like
# in cross-attention 2, gates and residuals 3 + 3 + 3, the activation 8; and on the way back 4 + 4, 6, 3, 3 + 3 + 3, 12,
# and 11 for the biases.
TRAFFIC = 27 + 49


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a model is made, and called on (latents, t, text, mask), and what keeps an average of its weights."""

    make: Callable[[argparse.Namespace, Ranks], nn.Module]
    call: Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], Tensor] = lambda model, *given: model(
        given[0], given[1], text=given[2], text_mask=given[3]
    )
    average: Literal["", "after AdamW", "in one pass"] = ""


def ours(options: argparse.Namespace, ranks: Ranks, *, compile: bool, recipe: str = "", backend: str = "") -> nn.Module:
    config = TrainConfig(steps=1, batch=options.batch, lr=1e-4, warmup=1, compile=compile)
    model = DiT(in_dim=CHANNELS, dim=options.dim, num_heads=HEADS, num_blocks=options.blocks, text_dim=TEXT_DIM).to(
        ranks.device
    )
    for parameter in model.parameters():  # zeros would let products of zeros count as work
        nn.init.normal_(parameter, std=0.02)
    model.fuse_projections()
    if recipe:
        plan = make_plan(model, recipe=recipe, batch=options.batch)
        if backend in ("torchao", "te"):
            (torchao if backend == "torchao" else transformer_engine).swap_linears(model, plan)
        else:
            linear.swap_linears(model, plan, fine_weight_gradient=backend == "native, fine weight gradient")
    if ranks.device.type == "cuda":
        tokens, width = (SIDE // model.config.patch_size) ** 2, options.dim // HEADS
        sdpa_autotune.use(model, *sdpa_autotune.measured(options.batch, HEADS, width, tokens, TEXT, ranks.device))
    parallelize(model, ranks, config)
    fsdp_allgather.gather_in_fp8(model, torch.bfloat16)
    if backend.startswith("native"):
        model.plan = plan
    return model


def diffusers_peer(options: argparse.Namespace, ranks: Ranks) -> nn.Module:
    from diffusers import PixArtTransformer2DModel

    model = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=options.dim // HEADS,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=options.blocks,
        cross_attention_dim=options.dim,
        sample_size=SIDE,
        caption_channels=TEXT_DIM,
        use_additional_conditions=False,
    ).to(ranks.device)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.transformer_blocks:
        block.forward = torch.compile(block.forward)
        fully_shard(block, mp_policy=policy)
    return fully_shard(model, mp_policy=policy)


def call_peer(model: nn.Module, latents: Tensor, t: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    none = {"resolution": None, "aspect_ratio": None}
    given = {"encoder_hidden_states": text, "encoder_attention_mask": mask, "added_cond_kwargs": none}
    return model(latents, timestep=t * TIMESTEPS, **given).sample


WAYS = {
    "BF16 eager": Way(make=functools.partial(ours, compile=False)),
    "BF16": Way(make=functools.partial(ours, compile=True)),
    "FP8 native": Way(make=functools.partial(ours, compile=True, recipe="delayed", backend="native")),
    "FP8 native, an average after AdamW": Way(
        make=functools.partial(ours, compile=True, recipe="delayed", backend="native"), average="after AdamW"
    ),
    "FP8 native, an average in one pass with AdamW": Way(
        make=functools.partial(ours, compile=True, recipe="delayed", backend="native"), average="in one pass"
    ),
    "FP8 native, weight gradient in BF16": Way(
        make=functools.partial(ours, compile=True, recipe="delayed", backend="native, fine weight gradient")
    ),
    "torchao tensorwise": Way(make=functools.partial(ours, compile=True, recipe="current", backend="torchao")),
    "torchao rowwise": Way(make=functools.partial(ours, compile=True, recipe="rowwise", backend="torchao")),
    "TransformerEngine delayed": Way(make=functools.partial(ours, compile=True, recipe="delayed", backend="te")),
    "TransformerEngine current": Way(make=functools.partial(ours, compile=True, recipe="current", backend="te")),
    "TransformerEngine MXFP8": Way(make=functools.partial(ours, compile=True, recipe="mxfp8", backend="te")),
    "diffusers PixArtTransformer2DModel, BF16": Way(make=diffusers_peer, call=call_peer),
}


def batch_of(options: argparse.Namespace, device: torch.device) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    latents, text = draw(options.batch, CHANNELS, SIDE, SIDE), draw(options.batch, TEXT, TEXT_DIM)
    t = torch.rand(options.batch, generator=generator, device=device)
    return [latents, t, text.bfloat16(), torch.ones(options.batch, TEXT, dtype=torch.bool, device=device)]


def shares(step: Callable[[], object]) -> dict[str, float]:
    """Of a step's time: in products, in attention, and in kernels that cast to FP8 and do nothing else."""
    activity = torch.profiler.ProfilerActivity
    cuda = torch.cuda.is_available()
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if cuda else [])]) as profile:
        step()
        wait()
    times = {"products": 0.0, "attention": 0.0, "casts": 0.0, "all": 0.0}
    for event in profile.key_averages():
        spent, name = event.self_device_time_total if cuda else event.self_cpu_time_total, event.key.lower()
        times["all"] += spent
        times[kind_of(name)] = times.get(kind_of(name), 0.0) + spent
    return {kind: spent / times["all"] for kind, spent in times.items()}


def kind_of(kernel: str) -> str:
    """By its name: a generated kernel has those of its operations, of which only casts to FP8 clamp."""
    if any(word in kernel for word in ("flash", "fmha", "attention", "cudnn_generated")):
        return "attention"
    if any(word in kernel for word in ("gemm", "nvjet", "cutlass", "xmma", "::mm", "::addmm", "_scaled_mm")):
        return "products"
    if "clamp" in kernel and not any(word in kernel for word in ("norm", "silu", "sigmoid", "add", "sum")):
        return "casts"
    return "others"


def measured(name: str, options: argparse.Namespace, ranks: Ranks, rates: dict[str, float]) -> str:
    """A row of the table."""
    way = WAYS[name]
    try:
        model = way.make(options, ranks)
    except (ValueError, ImportError) as error:
        return f"| {name} | {' '.join(str(error).split())} |" + " |" * 8
    config = TrainConfig(steps=1, batch=options.batch, lr=1e-4, warmup=1)
    optimizer = make_optimizer(model, config) if isinstance(model, DiT) else peer_optimizer(model)
    given = batch_of(options, ranks.device)
    ema = Ema(model, config.ema) if way.average else None
    one_pass = OnePass(model, optimizer, ema.averages) if ema and way.average == "in one pass" else None
    never = torch.zeros((), dtype=torch.bool, device=ranks.device)

    def step() -> None:
        way.call(model, *given).float().square().mean().backward()
        if one_pass:
            one_pass.step(config.lr, 1 - config.ema, never)
        else:
            optimizer.step()
            if ema:
                ema.update(model, step=0)
        optimizer.zero_grad()
        if hasattr(model, "plan"):
            scaling.update_scales(model, model.plan)

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    taken = seconds(step, options.repeats)
    memory = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else float("nan")
    share = shares(step)
    operations = options.batch * operations_of_an_image(options.dim, options.blocks) / 1e12
    rate = (
        rates["FP8"] if "BF16" not in name.split(",")[0] and "diffusers" not in name and rates["FP8"] else rates["BF16"]
    )
    traffic = 2 * TRAFFIC * options.dim * (SIDE // 2) ** 2 * options.blocks * options.batch / 1e9
    floor = operations / rate + traffic / rates["GB/s"]
    return (
        f"| {name} | {options.batch / taken:.1f} | {operations / taken:.3g} | {operations / taken / rates['BF16']:.0%} "
        f"| {memory:.1f} | {share['products']:.0%} | {share['attention']:.0%} | {share['casts']:.1%} "
        f"| {1e3 * taken:.0f} | {1e3 * floor:.0f} |"
    )


def peer_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


@functools.cache
def operations_of_an_image(dim: int, blocks: int) -> int:
    """Of our model, for every way: who does more for the same picture has no credit for it."""
    config = {"in_dim": CHANNELS, "dim": dim, "num_heads": HEADS, "num_blocks": blocks, "text_dim": TEXT_DIM}
    return training_flops(config, SIDE, TEXT)


def main() -> None:
    parser = measure.parser(__doc__, repeats=10)
    parser.add_argument("--dim", type=int, default=1152)
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--matrix", type=int, default=8192, help="side of the product that the card's rate is taken by")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    options = parser.parse_args()
    rates = {
        "BF16": measure.matrix_rate(options.matrix),
        "FP8": measure.fp8_matrix_rate(options.matrix),
        "GB/s": measure.bandwidth(),
    }
    size = f"{options.blocks} blocks of width {options.dim}, batch {options.batch}"
    lines = [
        f"# A training step, {size}, on {measure.card()}",
        "",
        f"torch {torch.__version__}. Measured of the card in the same run: {rates['BF16']:.3g} TFLOP/s in BF16, "
        f"{rates['FP8']:.3g} in FP8, {rates['GB/s']:,.0f} GB/s. The floor is the model's operations at that rate, and "
        "after them the bytes that have to pass between products, at that bandwidth.",
        "",
        "| way | images/s | TFLOP/s | MFU (BF16) | GB | products | attention | casts alone | ms a step | floor, ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    with process_group() as ranks:
        for name in options.only:
            lines.append(measured(name, options, ranks, rates))
            print(lines[-1], flush=True)
            torch._dynamo.reset()
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    measure.write("train-step", lines)


if __name__ == "__main__":
    main()
