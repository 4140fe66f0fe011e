"""FP8 all-gather for FSDP2: each rank casts its shard once per optimizer step, and a quarter of the bytes is sent.

FSDP2 calls `fsdp_pre_all_gather` and `fsdp_post_all_gather` if the local tensor of a parameter has them. The gathered
parameter then has an FP8 dtype while its gradient should have the compute dtype. `grad_dtype` sets that dtype, but a
compiled graph would still cast the gradient to FP8; a proxy without memory therefore carries it around the graph.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from pixart.model.fp8.linear import Float8Linear, GatheredWeight, float8_linears
from pixart.model.fp8.ops import E4M3, WEIGHT, amax, quantize


def enable_fp8_all_gather(model: nn.Module, dtype: torch.dtype) -> None:
    """Gather the weights of all FP8 linears in FP8.

    The model is sharded by `fully_shard` and its weights are materialized; `dtype` is the compute dtype.
    """
    for name, linear in float8_linears(model):
        all_gather = Float8AllGather(linear, dtype)
        # Registered after FSDP2's hook, which gathers the weights.
        fsdp_module_of(model, name).register_forward_pre_hook(all_gather.prepare_forward)


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
                del parameter._unsharded_param
                parameter.all_gather_outputs = []
                parameter._init_extensions()


def fsdp_module_of(model: nn.Module, name: str) -> Any:
    """Return the closest parent of a module that FSDP2 shards as one unit."""
    while not isinstance(module := model.get_submodule(name), FSDPModule):
        name = name.rpartition(".")[0]
    return module


class Float8AllGather:
    """FSDP2 all-gather extension of one weight; the shard is cast again when it or its scale has changed."""

    def __init__(self, linear: Float8Linear, dtype: torch.dtype) -> None:
        self.linear, self.dtype, self.weight = linear, dtype, linear.weight
        # FSDP2 reads the attributes of this very tensor: `to_local` returns another one with the same memory.
        shard: Any = cast(DTensor, linear.weight)._local_tensor
        shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather = self.pre_all_gather, self.post_all_gather
        self.shard = shard
        self.cast_versions: tuple[int, int] | None = None

    def pre_all_gather(
        self, mesh: DeviceMesh, outer_size: torch.Size, outer_stride: tuple[int, ...], module: nn.Module, policy: Any
    ) -> tuple[tuple[Tensor], None]:
        """Return this rank's shard in FP8, padded to the number of rows that every rank sends."""
        scale = self.linear.scale
        # An optimizer's fused kernels do not count as a change of the weight, but scales are updated after each step.
        versions = (self.weight._version, scale._version)
        if self.cast_versions != versions:
            rows = -(-outer_size[0] // mesh.size())
            shard8 = quantize(self.shard, scale[WEIGHT], E4M3).to(E4M3.dtype)
            if rows > len(shard8):
                shard8 = F.pad(shard8.view(torch.uint8), (0, 0, 0, rows - len(shard8))).view(E4M3.dtype)
            self.shard8 = shard8
            self.amax = amax(self.shard) if len(self.shard) else torch.zeros((), device=scale.device)
            self.cast_versions = versions
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
