"""The ranks of a run: process group, collectives on Python objects, and logging with the rank."""

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

LOOPBACK = "lo"  # a single process needs no name resolution, which fails where the host name has no address
LOGGED_PACKAGES = ("jobs", "pixart")  # log at level INFO; others at WARNING


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """The rank of this process in the process group, and collectives, which every rank must call."""

    rank: int
    world_size: int
    local_world_size: int  # ranks of this node
    device: torch.device
    cpu_group: dist.ProcessGroup | None = None  # for collectives that must not wait for the GPU
    save_group: dist.ProcessGroup | None = None  # for the thread that writes checkpoints

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def all_reduce_max(self, value: int) -> int:
        """Return the largest value of all ranks."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.cpu_group)
        return int(tensor)

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        self.all_reduce_max(0)

    def broadcast_object(self, value: Any) -> Any:
        """Return the value of rank 0."""
        objects = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(objects, group=self.cpu_group)
        return objects[0]

    def gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """Return the values of all ranks on rank 0, and an empty list on the others."""
        if self.world_size == 1:
            return [value]
        objects: list[Any] | None = [None] * self.world_size if self.is_first else None
        dist.gather_object(value, objects, group=group or self.cpu_group)
        return objects or []


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the group of RANK, WORLD_SIZE, LOCAL_RANK and MASTER_ADDR; without them, create one of a single rank."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    if world_size > 1:
        dist.init_process_group(backend)
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield Ranks(
            rank=rank,
            world_size=world_size,
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", world_size)),
            device=device,
            cpu_group=dist.new_group(backend="gloo"),
            save_group=dist.new_group(backend="gloo"),
        )
    except BaseException:
        if not cuda:  # NCCL would wait for the other ranks, which wait for this one, and the error would not appear
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def configure_logging(rank: int) -> None:
    """Log with time, level and rank: warnings and errors to stderr, the rest to stdout."""
    formatter = logging.Formatter(f"%(asctime)s %(levelname)s rank {rank}: %(message)s")
    output, errors = logging.StreamHandler(sys.stdout), logging.StreamHandler(sys.stderr)
    output.addFilter(lambda entry: entry.levelno < logging.WARNING)
    errors.setLevel(logging.WARNING)
    for handler in (output, errors):
        handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=[output, errors], force=True)
    for package in LOGGED_PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO)


def full_cpu_tensor(tensor: Tensor) -> Tensor:
    """Return the unsharded tensor on the CPU; every rank must call it."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
