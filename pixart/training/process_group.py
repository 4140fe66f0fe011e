"""Ranks: the process group, what they agree on, and whole tensors of what they share."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

LOOPBACK = "lo"  # a process alone needs no name resolution, which fails where the host's name has no address


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    rank: int
    world: int
    local_world: int  # ranks of this node
    device: torch.device
    cpu_group: dist.ProcessGroup | None = None  # for words between the ranks that no GPU should wait for
    save_group: dist.ProcessGroup | None = None  # for the thread that writes checkpoints

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

    def of_first(self, value: Any) -> Any:
        """Rank 0's value; every rank must call it."""
        word = [value]
        if self.world > 1:
            dist.broadcast_object_list(word, group=self.cpu_group)
        return word[0]

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """Every rank's value, on rank 0; an empty list elsewhere. Every rank must call it."""
        if self.world == 1:
            return [value]
        found: list[Any] | None = [None] * self.world if self.first else None
        dist.gather_object(value, found, group=group or self.cpu_group)
        return found or []


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
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Ranks(
            rank=rank,
            world=world,
            local_world=int(os.environ.get("LOCAL_WORLD_SIZE", world)),
            device=device,
            cpu_group=dist.new_group(backend="gloo"),
            save_group=dist.new_group(backend="gloo"),
        )
    except BaseException:
        if not cuda:  # NCCL would wait for the others, who wait for this rank, and nobody would hear why
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def whole(tensor: Tensor) -> Tensor:
    """The unsharded tensor on the CPU; every rank must call it."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
