"""Print the GPU kernels that torch.compile generates, as JSON; needs torch's CUDA build but no GPU.

    python -m tests.support.gpu_kernels linear    # norm, modulation, an FP8 linear forward and backward, an activation
    python -m tests.support.gpu_kernels optimizer # fused AdamW and EMA

The graph is traced on fake tensors and lowered for the GPU that HOPPER describes; nothing is run.
"""

import json
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import config, scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from pixart.model.fp8 import ops
from pixart.model.fp8.ops import INPUT, Float8LinearFunction
from pixart.training.optimizer import PARAMETER_TENSORS, adamw_ema_update

ROWS, WIDTH = 8192, 1152
HOPPER = {
    "major": 9,
    "multi_processor_count": 132,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
}


class Driver:
    """Triton driver of a GPU that does not exist."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_current_device(self) -> int:
        return 0


def pretend_to_have_a_gpu() -> None:
    card = types.SimpleNamespace(**HOPPER, minor=0, name="a GPU", total_memory=1 << 37, L2_cache_size=50 << 20)
    torch.cuda.get_device_properties = lambda *_: card
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.current_device = lambda: 0
    properties = DeviceProperties(type="cuda", index=0, cc=90, **HOPPER)
    DeviceProperties.create = classmethod(lambda *_: properties)
    scheduler.has_triton = _triton.has_triton = _triton.has_triton_package = lambda *_: True
    driver.set_active(Driver())
    config.compile_threads = 1


def forward_backward(
    x: Tensor, gamma: Tensor, weight: Tensor, bias: Tensor, scales: Tensor, staged: Tensor, after: Tensor
) -> tuple[Tensor, ...]:
    modulated = F.layer_norm(x, (WIDTH,)) * (1 + gamma)
    ops.update_amax(staged, INPUT, ops.amax(modulated))
    saved: list[Tensor] = []
    context = types.SimpleNamespace(save_for_backward=lambda *tensors: saved.extend(tensors))
    output = Float8LinearFunction.forward(context, modulated, weight, None, bias, scales, (WIDTH,), False, staged)
    context.saved_tensors, context.needs_input_grad = tuple(saved), (True, True, False, True)
    grads = Float8LinearFunction.backward(context, F.silu(after))
    return output, grads[0], grads[1], grads[3], staged


def linear() -> str:
    """Return the generated code of the FP8 linear."""
    mode = FakeTensorMode()
    with mode, torch.no_grad():
        bf16 = {"device": "cuda", "dtype": torch.bfloat16}
        inputs = [torch.empty(ROWS, WIDTH, **bf16), torch.empty(WIDTH, **bf16), torch.empty(WIDTH, WIDTH, **bf16)]
        inputs += [torch.empty(WIDTH, **bf16), torch.empty(1, 3, device="cuda"), torch.empty(3, device="cuda")]
        inputs.append(torch.empty(ROWS, WIDTH, **bf16))
    return generated(mode, forward_backward, inputs)


def optimizer() -> str:
    """Return the generated code of the optimizer for four parameters."""
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
    """Trace a function and return the code that inductor generates for it."""
    with mode, torch.no_grad():
        traced = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*inputs)
    with V.set_fake_mode(mode), DebugContext(), torch.no_grad():
        graph = GraphLowering(traced, example_inputs=inputs)
        with V.set_graph_handler(graph):
            graph.run(*inputs)
            return graph.codegen()[0].value


def describe(code: str) -> dict:
    """Return how often each kernel stores full tensors, and which operations are fused in it."""
    kernels = {}
    for name, source in re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", code, re.DOTALL):
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
    sources = re.findall(r"async_compile\.triton\('\w+', '''(.*?)'''", code, re.DOTALL)
    return [(source.count("tl.load("), source.count("tl.store(")) for source in sources]


if __name__ == "__main__":
    pretend_to_have_a_gpu()
    print(json.dumps(describe(linear()) if sys.argv[1] == "linear" else loads_and_stores(optimizer())))
