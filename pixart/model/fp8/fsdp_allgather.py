"""FP8 all-gather for FSDP2: each rank casts its shards once per optimizer step, and a quarter of the bytes is sent.

The weights of a block are cast together, in one compiled pass that also finds their largest magnitudes.

FSDP2 calls `fsdp_pre_all_gather` and `fsdp_post_all_gather` if the local tensor of a parameter has them. The gathered
parameter then has an FP8 dtype while its gradient should have the compute dtype. `grad_dtype` sets that dtype, but a
compiled graph would still cast the gradient to FP8; a proxy without memory therefore carries it around the graph.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from pixart.model.fp8.linear import Float8Linear, GatheredWeight, float8_linears
from pixart.model.fp8.ops import E4M3, WEIGHT, amax, quantize

CAST_OPTIONS: dict[str, Any] = {"combo_kernels": True}


def enable_fp8_all_gather(model: nn.Module, dtype: torch.dtype, *, compile: bool = False) -> None:
    """Gather the weights of all FP8 linears in FP8.

    The model is sharded by `fully_shard` and its weights are materialized; `dtype` is the compute dtype. `compile`
    compiles the casts of a block into one graph.
    """
    # All blocks have the same shapes: one graph suffices. Combined kernels make two launches of the casts of a block.
    cast = torch.compile(cast_shards, fullgraph=True, dynamic=False, options=CAST_OPTIONS) if compile else cast_shards
    casts: dict[int, BlockCast] = {}
    for name, linear in float8_linears(model):
        unit = fsdp_module_of(model, name)
        all_gather = Float8AllGather(linear, dtype, casts.setdefault(id(unit), BlockCast(cast)))
        # Registered after FSDP2's hook, which gathers the weights.
        unit.register_forward_pre_hook(all_gather.prepare_forward)


def disable_fp8_all_gather(model: nn.Module, name: str) -> None:
    """Gather the weight of one linear in its parameter's dtype again, after its fallback to BF16."""
    linear, module = cast(Float8Linear, model.get_submodule(name)), fsdp_module_of(model, name)
    shard: Any = cast(DTensor, linear.weight)._local_tensor
    del shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather
    state = module._get_fsdp_state()
    groups = (
        state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    )  # torch 2.11
    for group in groups:
        for parameter in group.fsdp_params:
            if parameter.sharded_param is linear.weight:  # FSDP2 keeps the gathered tensor, whose dtype has changed
                if hasattr(parameter, "_unsharded_param"):  # not before the first all-gather
                    del parameter._unsharded_param
                parameter.all_gather_outputs = []
                parameter._init_extensions()


def fsdp_module_of(model: nn.Module, name: str) -> Any:
    """Return the closest parent of a module that FSDP2 shards as one unit."""
    while not isinstance(module := model.get_submodule(name), FSDPModule):
        name = name.rpartition(".")[0]
    return module


def cast_shards(shards: Sequence[Tensor], scales: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return each of a block's shards in FP8, of its number of elements but not its shape, and its amax ().

    `scales` are (3,), by slot.
    """
    width = min(shard.shape[1] for shard in shards)  # a common width lets one launch reduce the rows of all shards
    results = []
    for shard, scale in zip(shards, scales, strict=True):
        flat = shard.view(-1, width) if shard.shape[1] % width == 0 else shard
        largest = amax(flat) if len(shard) else torch.zeros((), device=scale.device)
        results.append((quantize(flat, scale[WEIGHT], E4M3).to(E4M3.dtype), largest))
    return results


class BlockCast:
    """Casts of the shards of one FSDP2 unit, which are made again when any weight or scale has changed."""

    def __init__(self, cast: Callable[..., list[tuple[Tensor, Tensor]]]) -> None:
        self.cast = cast
        self.members: list[Float8AllGather] = []
        self.versions: list[tuple[int, int]] | None = None

    def update(self, ranks: int) -> None:
        """Cast all shards unless they are up to date; the weights are sharded over `ranks`."""
        # An optimizer's fused kernels do not count as a change of the weight, but scales are updated after each step.
        members = [member for member in self.members if member.linear.fp8_enabled]
        versions = [(member.weight._version, member.linear.scale._version) for member in members]
        if self.versions == versions:
            return
        shards, scales = [member.shard for member in members], [member.linear.scale for member in members]
        for member, (shard8, largest) in zip(members, self.cast(shards, scales), strict=True):
            shape, rows = member.shard.shape, -(-len(member.weight) // ranks)
            shard8 = shard8.view(shape)
            if padding := rows - len(shard8):  # every rank sends the same number of rows
                shard8 = F.pad(shard8.view(torch.uint8), (0, 0, 0, padding)).view(E4M3.dtype)
            member.shard8, member.amax = shard8, largest
        self.versions = versions


class Float8AllGather:
    """FSDP2 all-gather extension of one weight, which is cast with the others of its unit."""

    shard8: Tensor  # this rank's shard in FP8
    amax: Tensor  # (), of this rank's shard

    def __init__(self, linear: Float8Linear, dtype: torch.dtype, casts: BlockCast) -> None:
        self.linear, self.dtype, self.weight, self.casts = linear, dtype, linear.weight, casts
        # FSDP2 reads the attributes of this very tensor: `to_local` returns another one with the same memory.
        shard: Any = cast(DTensor, linear.weight)._local_tensor
        shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather = self.pre_all_gather, self.post_all_gather
        self.shard = shard
        casts.members.append(self)

    def pre_all_gather(
        self, mesh: DeviceMesh, outer_size: torch.Size, outer_stride: tuple[int, ...], module: nn.Module, policy: Any
    ) -> tuple[tuple[Tensor], None]:
        """Return this rank's shard in FP8, padded to the number of rows that every rank sends."""
        self.casts.update(mesh.size())
        return (self.shard8,), None

    def post_all_gather(
        self, gathered: tuple[Tensor, ...], metadata: None, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Return the full weight; with `out`, the memory of an earlier all-gather, the weight is already in it."""
        return None if out is not None else (gathered[0], gathered)

    def prepare_forward(self, module: nn.Module, arguments: Any) -> None:
        """Attach the gathered weight's state to the linear before a forward pass."""
        if self.linear.fp8_enabled:
            self.linear.weight.grad_dtype = self.dtype
            proxy = GradientProxy.apply(self.linear.weight, self.dtype)
            self.linear.gathered_weight = GatheredWeight(grad_proxy=proxy, amax=self.amax)


class GradientProxy(torch.autograd.Function):
    """Tensor without memory in place of a weight, whose gradient becomes the weight's gradient."""

    @staticmethod
    def forward(ctx, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.zeros((), dtype=dtype, device=weight.device).expand(weight.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
