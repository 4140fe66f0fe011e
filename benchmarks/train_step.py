"""Benchmark one optimizer step of the full-size model with each precision, FP8 backend and implementation, in one run.

    python -m benchmarks.train_step [--batch 128] [--only NAME ...]       # on a GPU
    python -m benchmarks.train_step --batch 2 --blocks 2 --dim 128        # smoke test on a CPU

The model has 28 blocks of width 1152 and reads 256 image tokens and 120 text tokens of width 2048. A step is the
forward pass, the backward pass and AdamW, with float32 master weights and FSDP2 on one rank. Each variant
runs in a separate process, with a smaller batch if memory does not suffice. Its row is written as soon as it is
measured; a variant that fails is listed with its error.

The column `roofline` is a lower bound of the time that the variant's compiled code needs on this GPU. It is the sum of
the GEMMs at the GPU's peak throughput for their precision, attention at the rate of the fastest kernel, and the memory
traffic of generated kernels, transposed copies and the optimizer at the GPU's bandwidth. These rates are measured in
the same run.
"""

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from benchmarks import generated_code, measure
from benchmarks.generated_code import Work
from conversion.calibration.plan import make_plan
from pixart.config.training import TrainConfig
from pixart.model import sdpa_autotune
from pixart.model.device_timer import median_seconds, synchronize
from pixart.model.dit import DiT
from pixart.model.flops import training_flops
from pixart.model.fp8 import fsdp_allgather, linear, scaling, torchao, transformer_engine
from pixart.model.fp8.tensor_cores import ANY_LAYOUT_CAPABILITY
from pixart.model.sdpa import AttentionKernel
from pixart.training.ema import EMA
from pixart.training.fused_adamw_ema import FusedAdamWEma
from pixart.training.optimizer import make_optimizer
from pixart.training.parallelize import parallelize
from pixart.training.process_group import Ranks, process_group

SIDE, PATCH, CHANNELS, HEADS, TEXT, TEXT_DIM = 32, 2, 16, 16, 120, 2048
TIMESTEPS = 1000  # of the time embedding in diffusers' model
# Bytes that a step moves per parameter outside of the blocks' graphs: the cast of the float32 weight (4 + 2), the cast
# of the gradient to float32 (2 + 4), AdamW's reads (weight, gradient, two moments) and writes (weight, two moments).
PARAMETER_BYTES = 6 + 6 + 4 * 4 + 3 * 4
SMALLER = 0.75  # factor of the batch size after running out of memory
LEAST_BATCH = 16  # smallest batch size after running out of memory; reduced batch sizes are multiples of it
OUT_OF_MEMORY = 75  # exit code of a subprocess that ran out of memory
KERNELS = 12  # number of longest kernels that are listed per variant
COLUMNS = ["variant", "batch", "images/s", "TFLOP/s", "MFU (BF16)", "GiB", "GEMM", "attention", "casts"]
COLUMNS += ["ms/step", "host, ms", "roofline, ms", "launches per block"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Variant of a training step.

    `make` creates the model, `call` runs it on (latents, t, text, mask), and `ema` states how the EMA weights are
    updated; "" means that there are no EMA weights.
    """

    make: Callable[[argparse.Namespace, Ranks], nn.Module]
    call: Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor], Tensor] = lambda model, *inputs: model(
        inputs[0], inputs[1], text=inputs[2], text_mask=inputs[3]
    )
    ema: Literal["", "after AdamW", "fused"] = ""


def ours(options: argparse.Namespace, ranks: Ranks, *, compile: bool, recipe: str = "", backend: str = "") -> nn.Module:
    """Return this suite's model, parallelized as in training.

    With an FP8 `recipe`, the planned linears are those of `backend`.
    """
    config = TrainConfig(steps=1, global_batch_size=options.batch, lr=1e-4, warmup_steps=1, compile=compile)
    model = DiT(in_dim=CHANNELS, dim=options.dim, num_heads=HEADS, num_blocks=options.blocks, text_dim=TEXT_DIM).to(
        ranks.device
    )
    for parameter in model.parameters():  # zero-initialized weights would count GEMMs with zeros as work
        nn.init.normal_(parameter, std=0.02)
    model.fuse_projections()
    if recipe:
        plan = make_plan(model, recipe=recipe, batch=options.batch)
        if backend in ("torchao", "te"):
            (torchao if backend == "torchao" else transformer_engine).swap_linears(model, plan)
        else:
            linear.swap_linears(model, plan, high_precision_grad_weight=backend == "native, BF16 weight gradient")
    if options.attention:
        sdpa_autotune.set_kernels(model, *(AttentionKernel(**kernel) for kernel in json.loads(options.attention)))
    parallelize(model, ranks, config)
    fsdp_allgather.enable_fp8_all_gather(model, torch.bfloat16)
    if backend.startswith("native"):
        model.plan = plan
    return model


def diffusers_peer(options: argparse.Namespace, ranks: Ranks) -> nn.Module:
    """Return diffusers' PixArt model of the same size, with compiled blocks under FSDP2 in BF16."""
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
    """Call diffusers' model on latents (B, C, H, W), t (B,) in [0, 1], text (B, L, text_dim) and mask (B, L)."""
    no_conditions = {"resolution": None, "aspect_ratio": None}
    arguments = {"encoder_hidden_states": text, "encoder_attention_mask": mask, "added_cond_kwargs": no_conditions}
    return model(latents, timestep=t * TIMESTEPS, **arguments).sample


VARIANTS = {
    "BF16 eager": Variant(make=functools.partial(ours, compile=False)),
    "BF16": Variant(make=functools.partial(ours, compile=True)),
    "FP8 native": Variant(make=functools.partial(ours, compile=True, recipe="delayed", backend="native")),
    "FP8 native, EMA after AdamW": Variant(
        make=functools.partial(ours, compile=True, recipe="delayed", backend="native"), ema="after AdamW"
    ),
    "FP8 native, EMA fused with AdamW": Variant(
        make=functools.partial(ours, compile=True, recipe="delayed", backend="native"), ema="fused"
    ),
    "FP8 native, weight gradient in BF16": Variant(
        make=functools.partial(ours, compile=True, recipe="delayed", backend="native, BF16 weight gradient")
    ),
    "torchao tensorwise": Variant(make=functools.partial(ours, compile=True, recipe="current", backend="torchao")),
    "torchao rowwise": Variant(make=functools.partial(ours, compile=True, recipe="rowwise", backend="torchao")),
    "TransformerEngine delayed": Variant(make=functools.partial(ours, compile=True, recipe="delayed", backend="te")),
    "TransformerEngine current": Variant(make=functools.partial(ours, compile=True, recipe="current", backend="te")),
    "TransformerEngine MXFP8": Variant(make=functools.partial(ours, compile=True, recipe="mxfp8", backend="te")),
    "diffusers PixArtTransformer2DModel, BF16": Variant(make=diffusers_peer, call=call_peer),
}


def batch_of(options: argparse.Namespace, device: torch.device) -> list[Tensor]:
    """Return random latents (B, C, H, W), t (B,), text (B, L, text_dim) in BF16, and an all-true mask (B, L)."""
    generator = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device)
    latents, text = draw(options.batch, CHANNELS, SIDE, SIDE), draw(options.batch, TEXT, TEXT_DIM)
    t = torch.rand(options.batch, generator=generator, device=device)
    return [latents, t, text.bfloat16(), torch.ones(options.batch, TEXT, dtype=torch.bool, device=device)]


def profiled(step: Callable[[], object]) -> tuple[dict[str, float], list[tuple[str, float, int]]]:
    """Profile a step; return the shares of its time by kind, and its longest kernels as (name, milliseconds, calls)."""
    activity = torch.profiler.ProfilerActivity
    cuda = torch.cuda.is_available()
    with torch.profiler.profile(activities=[activity.CPU, *([activity.CUDA] if cuda else [])]) as profile:
        step()
        synchronize()
    events = profile.key_averages()
    spent = [event.self_device_time_total if cuda else event.self_cpu_time_total for event in events]
    times = dict.fromkeys(("gemm", "attention", "casts", "other"), 0.0)
    for event, microseconds in zip(events, spent, strict=True):
        times[kind_of(event.key.lower())] += microseconds
    longest = sorted(zip(spent, events, strict=True), key=lambda pair: -pair[0])[:KERNELS]
    kernels = [(event.key, microseconds / 1e3, event.count) for microseconds, event in longest]
    return {kind: time / sum(spent) for kind, time in times.items()}, kernels


def kind_of(kernel: str) -> str:
    """Classify a kernel by its lower-case name.

    The name of a generated kernel lists its operations; of these, only casts to FP8 clamp.
    """
    if any(word in kernel for word in ("flash", "fmha", "attention", "cudnn_generated")):
        return "attention"
    if any(word in kernel for word in ("gemm", "nvjet", "cutlass", "xmma", "::mm", "::addmm", "_scaled_mm")):
        return "gemm"
    if "clamp" in kernel and not any(word in kernel for word in ("norm", "silu", "sigmoid", "add", "sum")):
        return "casts"
    return "other"


def measured(name: str, options: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Measure the training step of a variant.

    The result has the seconds per step, the seconds until all kernels are launched, the peak memory in GiB, the
    profile, the number of parameters, and the work and launches of a block (None without compilation).
    """
    variant = VARIANTS[name]
    model = variant.make(options, ranks)
    config = TrainConfig(steps=1, global_batch_size=options.batch, lr=1e-4, warmup_steps=1)
    optimizer = make_optimizer(model, config) if isinstance(model, DiT) else peer_optimizer(model)
    inputs = batch_of(options, ranks.device)
    ema = EMA(model, config.ema_decay) if variant.ema else None
    fused_update = FusedAdamWEma(model, optimizer, ema.weights) if ema and variant.ema == "fused" else None
    no_skip = torch.zeros((), dtype=torch.bool, device=ranks.device)

    def step() -> None:
        variant.call(model, *inputs).float().square().mean().backward()
        if fused_update:
            fused_update.step(config.lr, 1 - config.ema_decay, no_skip)
        else:
            optimizer.step()
            if ema:
                ema.update(model, step=0)
        optimizer.zero_grad()
        if hasattr(model, "plan"):
            scaling.update_scales(model, model.plan)

    with generated_code.recorded() as graphs:
        step()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    seconds = median_seconds(step, options.repeats)
    memory = torch.cuda.max_memory_allocated() / measure.GIB if torch.cuda.is_available() else float("nan")
    begun = time.perf_counter()
    step()
    host = time.perf_counter() - begun  # until all kernels are launched
    synchronize()
    shares, kernels = profiled(step)
    block = work_of_a_block(graphs)
    return {
        "seconds": seconds,
        "host_seconds": host,
        "memory": memory,
        "shares": shares,
        "kernels": kernels,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "work": block
        and {"fp8": block.operations["fp8"], "bf16": block.operations["bf16"], "bytes": moved_bytes(block)},
        "launches": block and sum(block.launches.values()),
    }


def work_of_a_block(graphs: list[Work]) -> Work | None:
    """Return the work of one block, forward and backward; all blocks share the same graphs.

    None if nothing was compiled.
    """
    of_blocks = [work for work in graphs if work.attentions]
    if len(of_blocks) < 2:
        return None
    return generated_code.total(of_blocks[-2:])  # a recompiled block runs its last graphs


def moved_bytes(block: Work) -> int:
    """Return the bytes that a block moves on this GPU; transposed copies count only where FP8 GEMMs require them."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != ANY_LAYOUT_CAPABILITY
    return block.generated_bytes + (block.transposed_bytes if hopper else 0)


def roofline_seconds(result: dict[str, Any], rates: dict[str, float], blocks: int, batch: int) -> float | None:
    """Return the lower bound in seconds of a variant's step on this GPU; None if nothing was compiled.

    `result` is that of `measured`, `rates` that of `gpu_rates`, and `batch` the batch size in images.
    """
    work = result["work"]
    if not work:
        return None
    gemm_seconds = work["bf16"] / rates["BF16"] / 1e12 + (work["fp8"] / rates["FP8"] / 1e12 if work["fp8"] else 0)
    memory_seconds = (blocks * work["bytes"] + PARAMETER_BYTES * result["parameters"]) / rates["GB/s"] / 1e9
    return blocks * (gemm_seconds + batch * rates["attention, s/image"]) + memory_seconds


def cells(name: str, result: dict[str, Any], rates: dict[str, float], options: argparse.Namespace) -> list[str]:
    """Return the cells of a variant's row, in the order of COLUMNS."""
    batch, seconds, share = result["batch"], result["seconds"], result["shares"]
    operations = batch * operations_of_an_image(options.dim, options.blocks) / 1e12
    roofline = roofline_seconds(result, rates, options.blocks, batch)
    return [
        name,
        str(batch),
        f"{batch / seconds:.1f}",
        f"{operations / seconds:.3g}",
        f"{operations / seconds / rates['BF16']:.0%}",
        f"{result['memory']:.1f}",
        f"{share['gemm']:.0%}",
        f"{share['attention']:.0%}",
        f"{share['casts']:.1%}",
        f"{1e3 * seconds:.0f}",
        f"{1e3 * result['host_seconds']:.0f}",
        f"{1e3 * roofline:.0f}" if roofline else "",
        f"{result['launches']}" if result["launches"] else "",
    ]


def gpu_rates(options: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """Measure the GPU's peak TFLOP/s and bandwidth, and its fastest attention kernels at the model's sizes."""
    rates: dict[str, Any] = {
        "BF16": measure.matrix_rate(options.matrix),
        "FP8": measure.fp8_matrix_rate(options.matrix) or measure.matrix_rate(options.matrix),  # FP8 is emulated
        "GB/s": measure.bandwidth(),
    }
    tokens, width = (SIDE // PATCH) ** 2, options.dim // HEADS
    image = sdpa_autotune.time_kernels(options.batch, HEADS, width, tokens, tokens, ranks.device, masked=False)
    text = sdpa_autotune.time_kernels(options.batch, HEADS, width, tokens, TEXT, ranks.device, masked=True)
    fastest = [sdpa_autotune.select_fastest(seconds) for seconds in (image, text)]
    attention_seconds = sum(seconds[kernel] for seconds, kernel in zip((image, text), fastest, strict=True))
    kernels = [{"backend": kernel.backend, "padded_head_dim": kernel.padded_head_dim} for kernel in fastest]
    return {**rates, "attention, s/image": attention_seconds / options.batch, "kernels": kernels}


def peer_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return fused AdamW with a single parameter group."""
    return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)


@functools.cache
def operations_of_an_image(dim: int, blocks: int) -> int:
    """Return the floating-point operations per image and step of this suite's model.

    Throughput of every variant is computed with this number, so that additional operations do not increase it.
    """
    config = {"in_dim": CHANNELS, "dim": dim, "num_heads": HEADS, "num_blocks": blocks, "text_dim": TEXT_DIM}
    return training_flops(config, SIDE, TEXT)


def run_subprocess(target: str, options: argparse.Namespace, batch: int, kernels: list[dict] | None) -> dict[str, Any]:
    """Run this module in a subprocess for one variant, or for the GPU's rates (`what` is "rates").

    Raises MemoryError if GPU memory does not suffice for `batch` images, and RuntimeError, with the last line on
    standard error, if the subprocess fails or exceeds the time limit.
    """
    words = [sys.executable, "-m", "benchmarks.train_step", "--only-this", target, "--batch", str(batch)]
    for name in ("repeats", "dim", "blocks", "matrix"):
        words += [f"--{name}", str(getattr(options, name))]
    if kernels and torch.cuda.is_available():
        words += ["--attention", json.dumps(kernels)]
    root = Path(__file__).parents[1]
    try:
        done = subprocess.run(words, capture_output=True, text=True, cwd=root, timeout=options.limit)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{target}: no result within {options.limit} s; raise --limit") from None
    if done.returncode == OUT_OF_MEMORY:
        raise MemoryError(f"--batch {batch}: out of GPU memory; use a smaller batch")
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(lines[-1])
    return json.loads(done.stdout.splitlines()[-1])


def with_smaller_batches(name: str, options: argparse.Namespace, kernels: list[dict]) -> dict[str, Any]:
    """Measure a variant at the requested batch size, or at the largest smaller one that fits into memory.

    Raises MemoryError if fewer than LEAST_BATCH images would be left.
    """
    batch = options.batch
    while True:
        try:
            return {**run_subprocess(name, options, batch, kernels), "batch": batch}
        except MemoryError:
            batch = int(SMALLER * batch) // LEAST_BATCH * LEAST_BATCH
            if batch < LEAST_BATCH:
                raise


def main() -> int:
    parser = measure.parser(__doc__, repeats=10)
    parser.add_argument("--dim", type=int, default=1152)
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument(
        "--matrix",
        type=int,
        default=8192,
        help="Side of the square GEMM that measures the peak throughput (default: %(default)s).",
    )
    parser.add_argument(
        "--limit", type=float, default=300, metavar="SECONDS", help="Time limit of one variant (default: %(default)s)."
    )
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--only-this", choices=["rates", *VARIANTS], help=argparse.SUPPRESS)
    parser.add_argument("--attention", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_this:
        return only_this(options)
    rates = run_subprocess("rates", options, options.batch, None)
    image, text = (AttentionKernel(**kernel) for kernel in rates["kernels"])
    heading = [
        f"# A training step, {options.blocks} blocks of width {options.dim}, on {measure.device_name()}",
        "",
        f"torch {torch.__version__}. Measured on this GPU in the same run: {rates['BF16']:.3g} TFLOP/s in BF16, "
        f"{rates['FP8']:.3g} in FP8, {rates['GB/s']:,.0f} GB/s; attention {image}, to the text {text}, "
        f"{1e6 * rates['attention, s/image']:.3g} us per block and image, forward and backward.",
    ]
    page = measure.Page(options.out, f"train-step-{options.batch}", heading, COLUMNS)
    for name in options.only:
        try:
            result = with_smaller_batches(name, options, rates["kernels"])
        except (RuntimeError, MemoryError, ValueError) as error:
            page.failed(name, error)
            continue
        page.row(*cells(name, result, rates, options))
        page.note(
            f"## {name}: the longest kernels of a step",
            "",
            "| ms | calls | kernel |",
            "|---|---|---|",
            *(
                f"| {ms:.2f} | {calls} | `{kernel[:100].replace('|', ' ')}` |"
                for kernel, ms, calls in result["kernels"]
            ),
        )
    return 0


def only_this(options: argparse.Namespace) -> int:
    """Measure one variant, or the GPU's rates, in this process; print the result as JSON and return the exit code."""
    with process_group() as ranks:
        try:
            if options.only_this == "rates":
                result = gpu_rates(options, ranks)
            else:
                result = measured(options.only_this, options, ranks)
        except torch.OutOfMemoryError:
            return OUT_OF_MEMORY
        except (ValueError, ImportError) as error:
            print(" ".join(str(error).split()), file=sys.stderr)
            return 2
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
