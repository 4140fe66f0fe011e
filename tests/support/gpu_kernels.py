"""Print a description of generated GPU kernels as JSON; needs torch's CUDA build, but no GPU.

python -m tests.support.gpu_kernels linear      # norm, modulation, an FP8 linear and an activation, both passes
python -m tests.support.gpu_kernels optimizer   # AdamW and the EMA weights in one pass
python -m tests.support.gpu_kernels block       # the FP8 stores and the work of a block, both passes
python -m tests.support.gpu_kernels block10     # the same on a GPU whose GEMMs accept any layout
python -m tests.support.gpu_kernels casts       # the kernels that cast the weights of a block on each of 8 ranks
python -m tests.support.gpu_kernels transpose   # the FP8 stores of an intentionally transposed cast
"""

import json
import re
import sys
import types
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import config
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from benchmarks import block_code
from benchmarks.generated_code import total
from benchmarks.lowering import lower, lower_module, pretend
from pixart.model.fp8 import fsdp_allgather, ops
from pixart.model.fp8.ops import E4M3, INPUT, Float8LinearFunction
from pixart.training.optimizer import PARAMETER_TENSORS, adamw_ema_update

ROWS, WIDTH, BATCH = 8192, 1152, 64
KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)'''", re.DOTALL)


def forward_backward(
    x: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor, scales: Tensor, staged: Tensor, after: Tensor
) -> tuple[Tensor, ...]:
    modulated = F.layer_norm(x, (WIDTH,)) * (1 + gamma)
    ops.update_amax(staged, INPUT, ops.amax(modulated))
    saved: list[Tensor] = []
    context = types.SimpleNamespace(save_for_backward=lambda *tensors: saved.extend(tensors))
    (output,) = Float8LinearFunction.forward(context, modulated, weight, None, bias, scales, (WIDTH,), False, staged)
    context.saved_tensors, context.needs_input_grad = tuple(saved), (True, True, False, True)
    grads = Float8LinearFunction.backward(context, F.silu(after))
    return output, grads[0], grads[1], grads[3], staged


def linear() -> str:
    """Return the generated code of an FP8 linear, forward and backward."""
    mode = FakeTensorMode()
    with mode, torch.no_grad():
        bf16 = {"device": "cuda", "dtype": torch.bfloat16}
        inputs = [torch.empty(ROWS, WIDTH, **bf16), torch.empty(WIDTH, **bf16), torch.empty(WIDTH, WIDTH, **bf16)]
        inputs += [torch.empty(WIDTH, **bf16), torch.empty(1, 3, device="cuda"), torch.empty(3, device="cuda")]
        inputs.append(torch.empty(ROWS, WIDTH, **bf16))
    return generated(mode, forward_backward, inputs)


def optimizer() -> str:
    """Return the generated code of the optimizer step of four parameters."""
    mode = FakeTensorMode()
    with mode:
        shapes = [(WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH,), (4 * WIDTH,)]
        rows = [
            [torch.empty(() if name == "step" else shape, device="cuda") for name in PARAMETER_TENSORS]
            for shape in shapes
        ]
        numbers = [torch.empty((), device="cuda", dtype=dtype) for dtype in (torch.float32, torch.float32, torch.bool)]

    def step(*inputs: Tensor) -> list[Tensor]:
        width = len(PARAMETER_TENSORS)
        parts = [inputs[start : start + width] for start in range(0, len(inputs) - len(numbers), width)]
        adamw_ema_update(parts, [0.01] * len(parts), *inputs[-len(numbers) :], 0.9, 0.95, 1e-15)
        return []

    with config.patch(combo_kernels=True):
        return generated(mode, functionalize(step), [tensor for row in rows for tensor in row] + numbers)


def generated(mode: FakeTensorMode, function: Callable[..., Any], inputs: list[Tensor]) -> str:
    """Trace a function on fake CUDA tensors and return the code that inductor generates."""
    with mode, torch.no_grad():
        traced = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)
    return lower(traced, inputs, mode).code


def block() -> dict:
    """Return where each kernel of an FP8 block stores FP8 values, and the work of the block."""
    lowered = lower_module(block_code.block(BATCH, fp8=True), *block_code.inputs(BATCH))
    stores = [store for part in lowered for store in float8_stores(part.code)]
    work = total([part.work for part in lowered])
    tensor = BATCH * block_code.TOKENS * WIDTH * torch.bfloat16.itemsize  # of all tokens
    units = [part.work.generated_bytes / tensor for part in lowered]
    return {"stores": stores, "units": units, **{field.name: getattr(work, field.name) for field in fields(work)}}


def casts() -> list[str]:
    """Return the kernels that are launched to cast a block's weights under FSDP2 on 8 ranks, and to find their amax."""
    mode = FakeTensorMode()
    with mode:
        shapes = [(WIDTH, WIDTH)] * 6 + [(4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]
        shards = [torch.empty(outputs // 8, inputs, device="cuda") for outputs, inputs in shapes]
        scales = [torch.empty(3, device="cuda") for _ in shapes]

    def cast_all(*tensors: Tensor) -> list[Tensor]:
        results = fsdp_allgather.cast_shards(tensors[: len(shapes)], tensors[len(shapes) :])
        return [tensor for result in results for tensor in result]

    with config.patch(fsdp_allgather.CAST_OPTIONS):
        return re.findall(r"(\w+)\.run\(", generated(mode, cast_all, [*shards, *scales]))


def transpose() -> dict:
    """Return the FP8 stores of a cast whose result is transposed, which the check must recognize."""
    mode = FakeTensorMode()
    with mode:
        inputs = [torch.empty(ROWS, WIDTH, device="cuda", dtype=torch.bfloat16), torch.empty((), device="cuda")]
    code = generated(mode, lambda x, scale: ops.quantize(x, scale, E4M3).t().contiguous(), inputs)
    return {"stores": float8_stores(code)}


def float8_stores(code: str) -> list[dict]:
    """Return the kernel of each FP8 store, and whether neighboring threads write neighboring bytes.

    The innermost variable of a reduction is `r0_N`, of a pointwise kernel `xN`; a kernel tiled in two dimensions has
    a YBLOCK.
    """
    all_stores = []
    for name, source in KERNEL.findall(code):
        pointers = re.findall(r"'(\w+)': '\*fp8", source)
        innermost = r"r0_\d+" if "r0_index" in source else r"x\d+|xindex"
        for pointer, index in re.findall(r"tl\.store\((\w+) \+ (\(.*?\)), tmp", source):
            if pointer in pointers:
                terms = [term.strip("() ") for term in index.split(" + ")]
                contiguous = any(re.fullmatch(innermost, term) for term in terms) and "YBLOCK" not in source
                all_stores.append({"kernel": name, "clamps": "minimum" in source, "contiguous": contiguous})
    return all_stores


def describe(code: str) -> dict:
    """Return how often each kernel stores full tensors, and which operations are fused in it."""
    kernels = {}
    for name, source in KERNEL.findall(code):
        body = source[source.index("def triton") :]
        stores = [line for line in body.splitlines() if "tl.store(" in line and f"{WIDTH}*" in line]
        kernels[name] = {
            "stores": len(stores),
            "e4m3": ".to(tl.float8e4nv)" in body,
            "e5m2": ".to(tl.float8e5)" in body,
            "norm": "rsqrt" in body,
            "activation": "libdevice.exp" in body or "tl_math.exp" in body or "sigmoid" in body,
            "amax": "triton_helpers.maximum" in body or "max2" in body,
            "column_sum": "ws_ptr" in body,
        }
    return {"kernels": kernels, "gemms": len(re.findall(r"= torch\.ops\.pixart\.tensor_core_gemm", code))}


def loads_and_stores(code: str) -> list[tuple[int, int]]:
    """Return the numbers of loads and stores of each kernel."""
    return [(source.count("tl.load("), source.count("tl.store(")) for _, source in KERNEL.findall(code)]


SUBJECTS: dict[str, Callable[[], Any]] = {
    "linear": lambda: describe(linear()),
    "optimizer": lambda: loads_and_stores(optimizer()),
    "block": block,
    "block10": block,
    "casts": casts,
    "transpose": transpose,
}

if __name__ == "__main__":
    pretend(10 if sys.argv[1] == "block10" else 9)
    print(json.dumps(SUBJECTS[sys.argv[1]]()))
