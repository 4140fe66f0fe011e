"""Weights that FSDP2 gathers in FP8: a rank casts its shard, once per optimizer step, and a quarter of the bytes move.

FSDP2 looks for `fsdp_pre_all_gather` and `fsdp_post_all_gather` on the local tensor of a parameter. The gathered
parameter has an FP8 type then, and its gradient is to be in the type of computation. Autograd can be told so; but a
compiled graph would cast the gradient to FP8 first, so it is led around the graph, through an empty tensor.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from pixart.model.fp8.linear import Float8Linear, Gathered, float8_linears
from pixart.model.fp8.ops import E4M3, WEIGHT, largest, quantize


def gather_in_fp8(model: nn.Module, dtype: torch.dtype) -> None:
    """For a model that `fully_shard` has sharded and whose weights are there; `dtype` is that of computation."""
    for name, linear in float8_linears(model):
        gathering = Gathering(linear, dtype)
        unit_of(model, name).register_forward_pre_hook(gathering.begins)  # behind FSDP2's own, which gathers


def gather_as_given(model: nn.Module, name: str) -> None:
    """For a linear that goes on without FP8."""
    linear, unit = model.get_submodule(name), unit_of(model, name)
    shard = linear.weight._local_tensor
    del shard.fsdp_pre_all_gather, shard.fsdp_post_all_gather
    state = unit._get_fsdp_state()
    groups = (
        state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]
    )  # torch 2.11
    for group in groups:
        for parameter in group.fsdp_params:
            if parameter.sharded_param is linear.weight:  # FSDP2 keeps the gathered one, whose type is another now
                del parameter._unsharded_param
                parameter.all_gather_outputs = []
                parameter._init_extensions()


def unit_of(model: nn.Module, name: str) -> Any:
    """The module that FSDP2 gathers together with this one."""
    while not isinstance(module := model.get_submodule(name), FSDPModule):
        name = name.rpartition(".")[0]
    return module


class Gathering:
    """A weight of which this rank has a shard, cast again when shard or scale has changed."""

    def __init__(self, linear: Float8Linear, dtype: torch.dtype) -> None:
        self.linear, self.dtype, self.weight = linear, dtype, linear.weight
        self.shard: Any = linear.weight._local_tensor  # itself: `to_local` gives another with the same memory
        self.shard.fsdp_pre_all_gather, self.shard.fsdp_post_all_gather = self.before, self.after
        self.made_of: tuple[int, int] | None = None

    def before(
        self, mesh: DeviceMesh, outer_size: torch.Size, outer_stride: tuple[int, ...], module: nn.Module, policy: Any
    ) -> tuple[tuple[Tensor], None]:
        """What this rank gives: as many rows as every rank, whether it has them or not."""
        scale = self.linear.scale
        # The fused kernels of an optimizer do not count as a change of the weight, but scales follow each of its steps.
        now = (self.weight._version, scale._version)
        if self.made_of != now:
            rows = -(-outer_size[0] // mesh.size())
            cast = quantize(self.shard, scale[WEIGHT], E4M3).to(E4M3.dtype)
            if rows > len(cast):
                cast = F.pad(cast.view(torch.uint8), (0, 0, 0, rows - len(cast))).view(E4M3.dtype)
            self.cast = cast
            self.amax = largest(self.shard) if len(self.shard) else torch.zeros((), device=scale.device)
            self.made_of = now
        return (self.cast,), None

    def after(
        self, gathered: tuple[Tensor, ...], made: None, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The whole weight. Where it was gathered before (`out`), it has come into the same memory."""
        return None if out is not None else (gathered[0], gathered)

    def begins(self, unit: nn.Module, arguments: Any) -> None:
        """Before a forward pass: the weight is there."""
        if self.linear.in_fp8:
            self.linear.weight.grad_dtype = self.dtype
            gradient = GradientOf.apply(self.linear.weight, self.dtype)
            self.linear.gathered = Gathered(gradient=gradient, amax=self.amax)


class GradientOf(torch.autograd.Function):
    """A tensor without memory in place of a weight: what is its gradient is the weight's."""

    @staticmethod
    def forward(ctx, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.zeros((), dtype=dtype, device=weight.device).expand(weight.shape)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
