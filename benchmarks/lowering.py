"""Lowering of compiled graphs for a GPU on a machine without one.

This requires torch's CUDA build but no GPU: the generated code can be inspected and counted, but not run. A module is
traced on CPU tensors with the FP8 GEMMs of tensor cores. Each graph that inductor would compile, forward and backward,
is then retraced on fake CUDA tensors and lowered for the GPU.
"""

import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import config, scheduler
from torch._inductor.compile_fx import compile_fx
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import post_grad_passes, view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.generated_code import Work, work_of_graph
from pixart.model.fp8 import ops, tensor_cores

CUDA = torch.device("cuda", 0)
HOPPER = {
    "major": 9,
    "multi_processor_count": 132,
    "regs_per_multiprocessor": 65536,
    "max_threads_per_multi_processor": 2048,
    "max_threads_per_block": 1024,
    "warp_size": 32,
}


class Driver:
    """Triton driver of an H100 that the machine does not have."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self) -> torch.device:
        return CUDA

    def get_current_device(self) -> int:
        return 0


def pretend(capability: int = 9) -> None:
    """Make torch and Triton report an H100 for the rest of this process.

    With another major compute `capability`, torch reports that, but Triton's code is still for an H100: the suite then
    selects the GEMMs of the other GPU.
    """
    tensor_cores.register_lowerings()
    gpu = types.SimpleNamespace(
        **{**HOPPER, "major": capability}, minor=0, name="a card", total_memory=1 << 37, L2_cache_size=50 << 20
    )
    torch.cuda.get_device_properties = lambda *_: gpu
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.current_device = lambda: 0
    properties = DeviceProperties(type="cuda", index=0, cc=90, **HOPPER)
    DeviceProperties.create = classmethod(lambda *_: properties)
    scheduler.has_triton = _triton.has_triton = _triton.has_triton_package = lambda *_, **__: True
    driver.set_active(Driver())
    config.compile_threads = 1


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """Generated code of one graph, and its work."""

    code: str
    work: Work


def lower(graph: GraphModule, inputs: Sequence[Tensor], mode: Any) -> Lowered:
    """Lower a graph as inductor does; `inputs` are fake CUDA tensors of the FakeTensorMode `mode`."""
    with V.set_fake_mode(mode), DebugContext(), torch.no_grad():
        view_to_reshape(graph)
        post_grad_passes(graph, False)
        graph.recompile()
        lowering = GraphLowering(graph, example_inputs=inputs)
        with V.set_graph_handler(lowering):
            lowering.run(*inputs)
            return Lowered(code=lowering.codegen()[0].value, work=work_of_graph(lowering))


def lower_module(module: nn.Module, *inputs: Tensor) -> list[Lowered]:
    """Lower the graphs of a module's forward and backward pass.

    The module and its inputs are on the CPU; their values are not used.
    """
    lowered: list[Lowered] = []

    def compile_graph(graph: GraphModule, _: Sequence[Any], **__: Any):
        lowered.append(lower_traced(graph))
        results = graph.graph.output_node().args[0]
        return make_boxed_func(
            lambda *_: [empty_like(result.meta["val"]) if hasattr(result, "meta") else None for result in results]
        )

    with (
        mock.patch.object(ops, "uses_tensor_cores", always),
        mock.patch.object(F, "scaled_dot_product_attention", attention_of_the_card),
    ):
        compiled = torch.compile(
            module,
            fullgraph=True,
            backend=lambda graph, example_inputs: compile_fx(graph, example_inputs, inner_compile=compile_graph),
        )
        result = compiled(*inputs)
        result.backward(torch.empty_like(result))
    torch._dynamo.reset()
    return lowered


def always(_: Tensor) -> bool:
    """Return True, in place of `ops.uses_tensor_cores`."""
    return True


def lower_traced(graph: GraphModule) -> Lowered:
    """Retrace a graph of CPU tensors with fake CUDA tensors, and lower it."""
    values = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    mode = next(value.fake_mode for value in values if isinstance(value, Tensor))
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": CUDA}
    graph.recompile()
    with mode, torch.no_grad():
        inputs = [empty_like(value, device=CUDA) if isinstance(value, Tensor) else value for value in values]
        decompositions = select_decomp_table()
        traced = make_fx(graph, decomposition_table=decompositions, tracing_mode="fake")(*inputs)
    return lower(traced, inputs, mode)


def empty_like(value: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Return an uninitialized tensor with the shape, strides and dtype of `value`; symbolic sizes become integers."""
    size, stride = ([int(number) for number in numbers] for numbers in (value.shape, value.stride()))
    return torch.empty_strided(size, stride, dtype=value.dtype, device=device)


def attention_of_the_card(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """Compute attention with the memory-efficient kernel, which torch would not select for CPU tensors.

    The boolean mask is converted to an additive bias, as torch does.
    """
    bias = None
    if attn_mask is not None:
        bias = torch.zeros(attn_mask.shape, dtype=q.dtype, device=q.device).masked_fill(~attn_mask, float("-inf"))
        bias = F.pad(bias, (0, -bias.shape[-1] % 8))[..., : bias.shape[-1]].expand(*q.shape[:-1], -1)
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, False, scale=scale)[0]
