"""Counts of the work in graphs that torch.compile lowers: floating-point operations, bytes and kernel launches.

`with recorded() as graphs:` collects the work of every graph that inductor compiles in the block, and `total(graphs)`
sums it. The counts come from the lowered graphs, not from the model: a GEMM that stayed in BF16 counts as BF16, and a
kernel that reads a tensor twice counts twice.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch._inductor import config, ir
from torch._inductor.dependencies import MemoryDep
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode, NopKernelSchedulerNode

# Operators of GEMMs, and the index of the left operand among their tensor inputs.
GEMMS = {"mm": 0, "addmm": 1, "bmm": 0, "baddbmm": 1, "_scaled_mm": 0, "tensor_core_gemm": 0}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(kw_only=True, slots=True)
class Work:
    """Work of one call of a compiled graph."""

    operations: Counter[str] = field(default_factory=Counter)  # floating-point operations of GEMMs by "fp8", "bf16"
    generated_bytes: int = 0  # read and written by generated kernels
    transposed_bytes: int = 0  # read and written by transposed copies of FP8 operands, which some GPUs require
    launches: Counter[str] = field(default_factory=Counter)  # by "generated", "gemms", "attention", "other"
    attentions: int = 0  # attention calls, forward and backward
    opaque_calls: int = 0  # calls of the suite's Python operators

    def __add__(self, other: "Work") -> "Work":
        return Work(
            operations=self.operations + other.operations,
            generated_bytes=self.generated_bytes + other.generated_bytes,
            transposed_bytes=self.transposed_bytes + other.transposed_bytes,
            launches=self.launches + other.launches,
            attentions=self.attentions + other.attentions,
            opaque_calls=self.opaque_calls + other.opaque_calls,
        )


@contextmanager
def recorded() -> Iterator[list[Work]]:
    """Yield a list to which the work of every graph compiled in the context is appended.

    Inductor's caches are disabled, so that every graph is lowered again.
    """
    works: list[Work] = []
    codegen = GraphLowering.codegen

    def recording(graph: GraphLowering):
        code = codegen(graph)
        works.append(work_of_graph(graph))
        return code

    GraphLowering.codegen = recording  # type: ignore[method-assign]
    try:
        with config.patch(force_disable_caches=True):
            yield works
    finally:
        GraphLowering.codegen = codegen  # type: ignore[method-assign]


def total(works: Sequence[Work]) -> Work:
    """Return the summed work of several graphs."""
    return sum(works, Work())


def work_of_graph(graph: GraphLowering) -> Work:
    """Return the work of a graph whose nodes inductor has scheduled."""
    work = Work()
    for node in graph.scheduler.nodes:
        if isinstance(node, NopKernelSchedulerNode):
            continue
        if not isinstance(node, ExternKernelSchedulerNode):
            work.launches["generated"] += 1
            work.generated_bytes += accessed_bytes(node)
        elif not isinstance(node.node, ir.MultiOutput):  # a node that only names a result of the previous call
            add_call(work, node)
    return work


def add_call(work: Work, node: BaseSchedulerNode) -> None:
    """Add the call of an external kernel, such as a GEMM or attention, to `work`."""
    kernel = node.node
    assert isinstance(kernel, ir.ExternKernel)
    name = operator_name(kernel)
    if name in GEMMS:
        left, right = [source for source in kernel.inputs if not isinstance(source, list)][GEMMS[name] :][:2]
        work.launches["gemms"] += 1
        precision = "fp8" if left.get_dtype() in FP8 else "bf16"
        work.operations[precision] += 2 * result_elements(kernel) * summed(name, kernel, left)
        if name == "tensor_core_gemm":
            work.opaque_calls += 1
            transpose_left, transpose_right = kernel.constant_args[:2]
            for operand, transposed in ((left, transpose_left), (right, not transpose_right)):
                work.transposed_bytes += 2 * elements(operand) if transposed else 0
    elif "attention" in name:
        work.launches["attention"] += 1
        work.attentions += 1
    else:
        work.launches["other"] += 1
        work.generated_bytes += accessed_bytes(node)


def accessed_bytes(node: BaseSchedulerNode) -> int:
    """Return the bytes that a kernel reads and writes; values that stay within the kernel are not counted.

    Each element of a buffer counts once per kernel and direction. Where a kernel accesses a part of a buffer only, such
    as the queries in the output of a fused GEMM, the part counts and not the buffer.
    """
    buffer_bytes = node.get_read_write_buffer_accesses(include_reads=True, include_writes=True)
    parts: dict[str, set[MemoryDep]] = defaultdict(set)
    for access in (*node.read_writes.reads, *node.read_writes.writes):
        if isinstance(access, MemoryDep) and not access.is_indirect():
            parts[access.name].add(access.normalize())
        else:
            parts[access.name] = set()
    return sum(
        min(size, sum(part.numbytes_hint() for part in parts[name]) or size) for name, size in buffer_bytes.items()
    )


def operator_name(kernel: ir.ExternKernel) -> str:
    """Return the name of a kernel's operator without namespace and overload."""
    if kernel.op_overload is not None:
        return kernel.op_overload.__name__.split(".")[0]
    return (kernel.get_kernel_name() or "").rpartition(".")[2]


def elements(buffer: ir.IRNode) -> int:
    """Return the number of elements of a buffer."""
    return math.prod(int(size) for size in buffer.get_size())


def result_elements(kernel: ir.ExternKernel) -> int:
    """Return the number of elements of a kernel's first result."""
    layout = kernel.layout if isinstance(kernel.layout, ir.Layout) else kernel.outputs[0].layout
    return math.prod(int(size) for size in layout.size)


def summed(name: str, kernel: ir.ExternKernel, left: ir.IRNode) -> int:
    """Return the size of a GEMM's reduction dimension."""
    sizes = [int(size) for size in left.get_size()]
    transposed = name == "tensor_core_gemm" and kernel.constant_args[0]
    return sizes[0] if transposed else sizes[-1]
