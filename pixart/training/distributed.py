"""Ranks and shards: the process group, FSDP2 around the model, and whole tensors back out of it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    rank: int
    world: int
    device: torch.device
    cpu_group: dist.ProcessGroup | None = None  # for words between the ranks that no GPU should wait for

    @property
    def first(self) -> bool:
        return self.rank == 0

    def agree(self, value: int) -> int:
        """The largest value of any rank; every rank must call it."""
        if self.world == 1:
            return value
        word = torch.tensor(value)
        dist.all_reduce(word, op=dist.ReduceOp.MAX, group=self.cpu_group)
        return int(word)


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Joins the group that RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR describe; one of its own without them."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    if world > 1:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        cpu_group = dist.new_group(backend="gloo") if cuda else None
        yield Ranks(rank=rank, world=world, device=device, cpu_group=cpu_group)
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module, ranks: Ranks, precision: str) -> None:
    """FSDP2 in place: each block a unit, the rest another; float32 master weights, computation in `precision`."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    # Time stays float32 on its way in: the model casts what it multiplies with weights.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(ranks.device.type, (ranks.world,))
    for block in model.dit_blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def whole(tensor: Tensor) -> Tensor:
    """The unsharded tensor on the CPU; every rank must call it."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def like(tensor: Tensor, reference: Tensor) -> Tensor:
    """A copy of a whole tensor, sharded, placed and typed as `reference` is."""
    tensor = tensor.to(reference.device, reference.dtype)
    if isinstance(reference, DTensor):
        return distribute_tensor(tensor, reference.device_mesh, reference.placements)
    return tensor.clone()
