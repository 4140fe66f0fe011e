"""Checkpoints of a run while it trains: written in the background by all ranks, checked when they are read."""

import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.tensor import DTensor, distribute_tensor

from pixart.checkpoint import directory as checkpoints
from pixart.checkpoint.dcp_reader import METADATA, Planner, Reader, readable
from pixart.checkpoint.directory import STATE, Checkpoint, checksum, write_record
from pixart.training.process_group import Ranks
from pixart.training.trainer import Training

DAMAGED = ".damaged"


class ReusedMemoryStager(AsyncStager):
    """Copy a state to CPU memory that is allocated once and reused by later saves.

    torch's `DefaultStager` does the same from torch 2.12 on; in 2.11 it releases its memory after each copy and cannot
    be used a second time.
    """

    _synchronize_after_execute = False  # `stage` returns when the copy is complete

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        self.copies = StateDictStager(pin_memory=pinned, share_memory=False)

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        staged = self.copies.stage(state_dict, non_blocking=self.pinned)
        if self.pinned:
            torch.cuda.synchronize()
        return staged

    def synchronize_staging(self) -> None:
        pass

    def close(self) -> None:
        self.copies.close()


class Saver:
    """Saves to a run folder. Training stops for the copy of the state alone, into memory that is used again."""

    def __init__(self, run: Path, ranks: Ranks, *, keep_last: int, keep_every: int) -> None:
        self.folder, self.ranks = run / "checkpoints", ranks
        self.keep_last, self.keep_every = keep_last, keep_every
        self.stager = ReusedMemoryStager(pinned=ranks.device.type == "cuda")
        self.pool = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None
        if ranks.first:
            for partial in self.folder.glob(".step-*.partial"):  # of an attempt that was killed
                shutil.rmtree(partial)

    def save(self, training: Training) -> Path:
        """Begins to write the state as it is, once the checkpoint before is written; every rank must call it."""
        self.wait()
        directory = self.folder / f"step-{training.steps_done:08d}"
        partial = directory.with_name(f".{directory.name}.partial")
        written = dcp.async_save(
            training.tensors(),
            # All is on the CPU already: copying ahead would wait for the first GPU's training, of every rank.
            storage_writer=FileSystemWriter(partial / STATE, per_thread_copy_ahead=0),
            process_group=self.ranks.save_group,
            async_stager=self.stager,
            no_dist=self.ranks.world == 1,  # Gloo's threads would bring OpenMP teams of their own
        )
        assert isinstance(written, Future)
        self.pending = self.pool.submit(self.finish, written, training.description(), partial, directory)
        return directory

    def finish(self, written: Future, description: Checkpoint, partial: Path, directory: Path) -> None:
        """Gives the directory its name when all ranks have written."""
        written.result()
        own = {file.name: checksum(file) for file in (partial / STATE).glob(f"__{self.ranks.rank}_*")}
        found = self.ranks.gather(own, self.ranks.save_group)
        if not self.ranks.first:
            return
        files = {name: sums for part in found for name, sums in part.items()}
        files[METADATA] = checksum(partial / STATE / METADATA)
        write_record(description, partial, files)
        if directory.exists():
            shutil.rmtree(directory)
        partial.replace(directory)
        self.prune()

    def prune(self) -> None:
        """Leaves the newest, and each of a step that is a multiple."""
        for directory in checkpoints.steps(self.folder.parent)[: -self.keep_last]:
            if not self.keep_every or checkpoints.read_record(directory)["step"] % self.keep_every:
                shutil.rmtree(directory)

    def wait(self) -> None:
        """Until the last checkpoint is written. Raises what has kept it from that."""
        if self.pending:
            pending, self.pending = self.pending, None
            pending.result()

    def close(self) -> None:
        self.wait()
        self.pool.shutdown()
        self.stager.close()


def newest_whole(run: Path, ranks: Ranks) -> tuple[Path | None, list[str]]:
    """The newest checkpoint of a run that is as it was written, and what is wrong with those after it.

    A damaged one is renamed, so that nobody takes it for one. Every rank must call it, and reads a part of the files.
    """
    faults: list[str] = []
    for directory in reversed(checkpoints.steps(run)):
        fault = ""
        try:
            checkpoints.check_files(directory, slice(ranks.rank, None, ranks.world))
            checkpoints.describe(directory)
        except ValueError as error:
            fault = str(error)
        if not ranks.agree(bool(fault)):
            return directory, faults
        told = [word for word in ranks.gather(fault) if word]
        if ranks.first:
            directory.replace(directory.with_name(directory.name + DAMAGED))
            faults.append(f"{told[0]}: {directory.name} is left out, the checkpoint before it is taken")
            print(faults[-1], file=sys.stderr, flush=True)
        ranks.agree(0)  # nobody looks on before it has its new name
    return None, faults


@torch.no_grad()
def restore(training: Training, directory: Path) -> None:
    """Fills the training state from a checkpoint, whatever number of ranks wrote it; every rank must call it.

    Raises ValueError where that lacks a tensor or has one of another shape.
    """
    live = training.tensors()
    if (directory / STATE).exists():
        with readable(directory / STATE):
            dcp.load(
                live,
                storage_reader=Reader(directory / STATE),
                planner=Planner(flatten_state_dict=False),
                process_group=training.ranks.save_group,
                no_dist=training.ranks.world == 1,
            )
    else:
        read = checkpoints.load(directory).tensors()
        for key, target in live.items():
            group, _, name = key.partition(".")
            found = read[group].get(name)
            if found is None or found.shape != target.shape:
                raise ValueError(f"{directory}: {key} is missing or not of shape {tuple(target.shape)}")
            target.copy_(own_part(found, target))
    training.fit_gradient_scales()


def own_part(tensor: Tensor, target: Tensor) -> Tensor:
    """Of a whole tensor that every rank has, what a rank keeps of `target`."""
    tensor = tensor.to(target.device, target.dtype)
    if not isinstance(target, DTensor):
        return tensor
    return distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)
