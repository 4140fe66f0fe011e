"""Checkpoints of a run: written in the background by all ranks, verified when they are read."""

import logging
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint._state_dict_stager import StateDictStager
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.tensor import DTensor, distribute_tensor

from pixart.atomic import file_lock
from pixart.checkpoint import directory as checkpoints
from pixart.checkpoint.dcp_reader import RestrictedReader, WeightsOnlyPlanner, raise_value_error
from pixart.checkpoint.directory import STATE, Checkpoint, write_metadata
from pixart.checkpoint.integrity import length_and_crc32c
from pixart.model.fp8 import scaling
from pixart.training.process_group import Ranks
from pixart.training.trainer import Trainer

DAMAGED_SUFFIX = ".damaged"
REMOVED_SUFFIX = ".old"  # of a checkpoint that is being removed
LOCK, OWNER = ".train.lock", ".train.lock-owner"  # files in the run folder
logger = logging.getLogger(__name__)


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


class CheckpointManager:
    """Saves checkpoints of a run asynchronously: training waits only while the state is copied to CPU memory."""

    def __init__(
        self,
        run: Path,
        ranks: Ranks,
        *,
        keep_last: int,
        keep_every: int,
        evaluate_every: int = 0,
        on_evaluation: Callable[[Path], None] | None = None,
    ) -> None:
        self.folder, self.ranks = run / "checkpoints", ranks
        self.keep_last, self.keep_every, self.evaluate_every = keep_last, keep_every, evaluate_every
        self.on_evaluation = on_evaluation  # called on rank 0 for each complete checkpoint that is to be evaluated
        self.stager = ReusedMemoryStager(pinned=ranks.device.type == "cuda")
        self.executor = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None
        if ranks.is_first:
            # Left by a killed process: `RunLock` excludes another one that writes checkpoints of this run. A conversion
            # beside it has other names.
            for partial in self.folder.glob(f".step-{8 * '[0-9]'}.partial"):
                shutil.rmtree(partial, ignore_errors=True)

    def save(self, trainer: Trainer) -> Path:
        """Wait for the previous checkpoint, then start writing the current state; every rank must call it."""
        self.wait()
        directory = self.folder / f"step-{trainer.steps_done:08d}"
        partial = directory.with_name(f".{directory.name}.partial")
        written = dcp.async_save(
            trainer.state_tensors(),
            # The state is on the CPU already; copying ahead would synchronize every rank with the first GPU.
            storage_writer=FileSystemWriter(partial / STATE, per_thread_copy_ahead=0),
            process_group=self.ranks.save_group,
            async_stager=self.stager,
            no_dist=self.ranks.world_size == 1,  # avoids Gloo's threads, which would start OpenMP teams
        )
        assert isinstance(written, Future)
        self.pending = self.executor.submit(self.finish, written, trainer.metadata(), partial, directory)
        return directory

    def finish(self, written: Future, metadata: Checkpoint, partial: Path, directory: Path) -> None:
        """Wait until all ranks have written, then write the metadata and rename the directory."""
        written.result()
        local_files = (partial / STATE).glob(f"__{self.ranks.rank}_*")
        local_checksums = {f"{STATE}/{file.name}": length_and_crc32c(file) for file in local_files}
        gathered = self.ranks.gather(local_checksums, self.ranks.save_group)
        if not self.ranks.is_first:
            return
        files = {name: checksum for checksums in gathered for name, checksum in checksums.items()}
        write_metadata(metadata, partial, files)
        remove(directory)
        partial.replace(directory)
        self.prune()
        if self.on_evaluation and self.is_evaluated(metadata.step):
            self.on_evaluation(directory)

    def is_evaluated(self, step: int) -> bool:
        """Return whether the checkpoint of a step is evaluated."""
        return self.evaluate_every > 0 and step % self.evaluate_every == 0

    def prune(self) -> None:
        """Delete old checkpoints but for the last `keep_last`, evaluated ones and multiples of `keep_every`."""
        for directory in checkpoints.list_checkpoints(self.folder.parent)[: -self.keep_last]:
            if not self.is_kept(directory):
                remove(directory)

    def is_kept(self, directory: Path) -> bool:
        """Return whether an old checkpoint stays; its step is only read if that depends on it."""
        if not self.keep_every and not self.evaluate_every:
            return False
        step = checkpoints.read_metadata(directory)["step"]
        return (self.keep_every > 0 and step % self.keep_every == 0) or self.is_evaluated(step)

    def wait(self) -> None:
        """Wait until the last checkpoint is written, and raise its error if there is one."""
        if self.pending:
            pending, self.pending = self.pending, None
            pending.result()

    def close(self) -> None:
        """Wait for the last checkpoint and release threads and memory."""
        self.wait()
        self.executor.shutdown()
        self.stager.close()


@contextmanager
def run_lock(run: Path, ranks: Ranks) -> Iterator[None]:
    """Exclude a second training of the same run while the context is active; every rank must enter it.

    Raises ValueError if another process trains the run. Without effect on a file system that has no locks.
    """
    error = ""
    with file_lock(run / LOCK, wait=False) if ranks.is_first else nullcontext(True) as held:
        if not held:
            owner = (run / OWNER).read_text().strip() if (run / OWNER).exists() else "another process"
            error = f"{run}: is being trained by {owner}; wait for its end, or cancel it"
        elif ranks.is_first:
            (run / OWNER).write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        if error := ranks.broadcast_object(error):
            raise ValueError(error)
        yield


def remove(directory: Path) -> None:
    """Remove a checkpoint, if it exists, and what earlier removals of this run left.

    A network file system may keep a file that is open somewhere: this is a warning, and the next removal tries again.
    """
    if directory.exists():  # renamed first, so that no reader takes a half-removed checkpoint for a complete one
        directory.replace(directory.with_name(f".{directory.name}.{secrets.token_hex(4)}{REMOVED_SUFFIX}"))
    for obsolete in directory.parent.glob(f".step-*{REMOVED_SUFFIX}"):
        try:
            shutil.rmtree(obsolete)
        except OSError as error:
            logger.warning("%s cannot be removed now, and is removed later: %s", obsolete, error)


def find_damage(directory: Path, ranks: Ranks) -> str:
    """Return what is missing or altered in a checkpoint, "" if nothing is; each rank reads a share of the files.

    Every rank must call it, and every rank gets the same answer.
    """
    local_error = ""
    try:
        checkpoints.check_files(directory, slice(ranks.rank, None, ranks.world_size))
        checkpoints.load_without_tensors(directory)
    except ValueError as error:
        local_error = str(error)
    if not ranks.all_reduce_max(bool(local_error)):
        return ""
    errors = [message for message in ranks.gather(local_error) if message]
    return ranks.broadcast_object(errors)[0]


def verify(directory: Path, ranks: Ranks) -> None:
    """Raise ValueError on every rank if a file of a checkpoint is missing or altered; every rank must call it."""
    if damage := find_damage(directory, ranks):
        raise ValueError(damage)


def find_newest_valid(run: Path, ranks: Ranks) -> tuple[Path | None, list[str]]:
    """Return the newest undamaged checkpoint of a run, or None, and an error message for each newer one.

    Damaged checkpoints are renamed so that no later attempt uses them. Every rank must call it; the messages are on
    rank 0 only.
    """
    errors: list[str] = []
    for directory in reversed(checkpoints.list_checkpoints(run)):
        damage = find_damage(directory, ranks)
        if not damage:
            return directory, errors
        if ranks.is_first:
            directory.replace(directory.with_name(directory.name + DAMAGED_SUFFIX))
            errors.append(f"{directory.name} is skipped, resuming from the checkpoint before it: {damage}")
            logger.warning(errors[-1])
        ranks.barrier()  # no rank lists checkpoints before the directory is renamed
    return None, errors


@torch.no_grad()
def restore(trainer: Trainer, directory: Path) -> None:
    """Load a verified checkpoint, written by any number of ranks, into the training state; every rank must call it.

    Raises ValueError if a tensor is missing or of another shape.
    """
    targets = trainer.state_tensors()
    if checkpoints.is_distributed(directory):
        with raise_value_error(directory / STATE):
            dcp.load(
                targets,
                storage_reader=RestrictedReader(directory / STATE),
                planner=WeightsOnlyPlanner(flatten_state_dict=False),
                process_group=trainer.ranks.save_group,
                no_dist=trainer.ranks.world_size == 1,
            )
    else:
        loaded = checkpoints.load(directory, verify=False).tensors()
        for key, target in targets.items():
            group, _, name = key.partition(".")
            tensor = loaded[group].get(name)
            if tensor is None or tensor.shape != target.shape:
                raise ValueError(f"{directory}: {key} is missing or its shape is not {tuple(target.shape)}")
            target.copy_(shard_like(tensor, target))
    trainer.rescale_gradients_for_batch_size()
    scaling.share_loaded_scales(trainer.model)


def shard_like(tensor: Tensor, target: Tensor) -> Tensor:
    """Shard a tensor that every rank has like `target`."""
    tensor = tensor.to(target.device, target.dtype)
    if not isinstance(target, DTensor):
        return tensor
    return distribute_tensor(tensor, target.device_mesh, target.placements, src_data_rank=None)
