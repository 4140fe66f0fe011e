"""What compiled code does, read off the graphs that torch.compile lowers: operations of products, bytes, launches.

`with recorded() as graphs:` collects every graph that inductor compiles within; `work_of(graphs)` adds them up. Nothing
is estimated from the model: a product that was kept in BF16 counts as BF16, and a kernel that reads its tensor twice
counts twice.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch._inductor import config, ir
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode, NopKernelSchedulerNode

# Operators of matrix products, and which of their tensors is the left operand.
PRODUCTS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1, "_scaled_mm": 0, "tensor_core_gemm": 0}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(kw_only=True, slots=True)
class Work:
    """What one call of a compiled graph does."""

    operations: Counter[str] = field(default_factory=Counter)  # floating-point operations of products, by "fp8", "bf16"
    generated_bytes: int = 0  # read and written by the kernels that were generated
    transposed_bytes: int = 0  # read and written for FP8 operands that a card wants transposed
    launches: Counter[str] = field(default_factory=Counter)  # by "generated", "products", "attention", "other"
    attentions: int = 0  # calls, forward and backward

    def __add__(self, other: "Work") -> "Work":
        return Work(
            operations=self.operations + other.operations,
            generated_bytes=self.generated_bytes + other.generated_bytes,
            transposed_bytes=self.transposed_bytes + other.transposed_bytes,
            launches=self.launches + other.launches,
            attentions=self.attentions + other.attentions,
        )


@contextmanager
def recorded() -> Iterator[list[Work]]:
    """Yield a list that gets the work of every graph that is compiled within.

    Caches of compiled code are bypassed, so that every graph is lowered anew.
    """
    found: list[Work] = []
    codegen = GraphLowering.codegen

    def recording(graph: GraphLowering):
        code = codegen(graph)
        found.append(work_of_graph(graph))
        return code

    GraphLowering.codegen = recording  # type: ignore[method-assign]
    try:
        with config.patch(force_disable_caches=True):
            yield found
    finally:
        GraphLowering.codegen = codegen  # type: ignore[method-assign]


def total(works: Sequence[Work]) -> Work:
    return sum(works, Work())


def work_of_graph(graph: GraphLowering) -> Work:
    """Add up the nodes of a graph that has been scheduled."""
    work = Work()
    for node in graph.scheduler.nodes:
        if isinstance(node, NopKernelSchedulerNode):
            continue
        if not isinstance(node, ExternKernelSchedulerNode):
            work.launches["generated"] += 1
            work.generated_bytes += node.get_read_write_buffers_sizes()
        elif not isinstance(node.node, ir.MultiOutput):  # which only names a result of the call before it
            add_call(work, node)
    return work


def add_call(work: Work, node: BaseSchedulerNode) -> None:
    """Count a call of a kernel that was not generated."""
    kernel = node.node
    assert isinstance(kernel, ir.ExternKernel)
    name = operator_name(kernel)
    if name in PRODUCTS:
        left, right = [source for source in kernel.inputs if not isinstance(source, list)][PRODUCTS[name] :][:2]
        work.launches["products"] += 1
        precision = "fp8" if left.get_dtype() in FP8 else "bf16"
        work.operations[precision] += 2 * result_elements(kernel) * summed(name, kernel, left)
        if name == "tensor_core_gemm":
            turn_left, turn_right = kernel.constant_args[:2]
            for operand, turned in ((left, turn_left), (right, not turn_right)):
                work.transposed_bytes += 2 * elements(operand) if turned else 0
    elif "attention" in name:
        work.launches["attention"] += 1
        work.attentions += 1
    else:
        work.launches["other"] += 1
        work.generated_bytes += node.get_read_write_buffers_sizes()


def operator_name(kernel: ir.ExternKernel) -> str:
    """The operator's name without namespace and overload."""
    if kernel.op_overload is not None:
        return kernel.op_overload.__name__.split(".")[0]
    return (kernel.get_kernel_name() or "").rpartition(".")[2]


def elements(buffer: ir.IRNode) -> int:
    return math.prod(int(size) for size in buffer.get_size())


def result_elements(kernel: ir.ExternKernel) -> int:
    layout = kernel.layout if isinstance(kernel.layout, ir.Layout) else kernel.outputs[0].layout
    return math.prod(int(size) for size in layout.size)


def summed(name: str, kernel: ir.ExternKernel, left: ir.IRNode) -> int:
    """How many values each element of a product sums over."""
    sizes = [int(size) for size in left.get_size()]
    turned = name == "tensor_core_gemm" and kernel.constant_args[0]
    return sizes[0] if turned else sizes[-1]
