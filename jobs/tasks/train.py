"""The train job: one rank of a training run."""

import os
from pathlib import Path

from jobs.state.journal import Journal
from pixart.config.recipe import from_json

PORTS = range(20_000, 32_768)  # below the default of net.ipv4.ip_local_port_range


def run(run_folder: str, *, stage: int, start: str | None) -> str:
    """Called on every rank; returns the last checkpoint's directory.

    Raises Left where the cluster has asked for the nodes, once all ranks have saved together.
    """
    join_ranks()

    from pixart.training.loop import Stopped, train
    from slurm.task import Left, stop_level

    recipe = from_json((Path(run_folder) / "config.json").read_text())
    try:
        last = train(
            stage=stage,
            model=recipe.model,
            config=recipe.train(stage),
            dataset=recipe.data.path,
            run=run_folder,
            start=start,
            reporter=Journal(run_folder),
            stop=stop_level,
        )
    except Stopped as stopped:
        raise Left(stopped.level) from stopped
    return str(last)


def quiet_port(number: int) -> int:
    """Of submitit's number, which every rank draws alike, one that Linux gives to nobody who asks for any port.

    Most of submitit's are of those, and on a busy machine each may be taken by some connection.
    """
    return PORTS[number % len(PORTS)]


def join_ranks() -> None:
    """Sets the variables that torch.distributed reads; a profile's MASTER_ADDR goes before the first node's name."""
    from submitit.helpers import TorchDistributedEnvironment

    found = TorchDistributedEnvironment()
    found.master_addr = os.environ.get("MASTER_ADDR", found.master_addr)
    if "MASTER_PORT" not in os.environ:
        found.master_port = quiet_port(found.master_port)
    found.export(set_cuda_visible_devices=False, overwrite=True)
    print(
        f"rank {found.rank} of {found.world_size}, local rank {found.local_rank} of {found.local_world_size}, "
        f"master {found.master_addr}:{found.master_port}",
        flush=True,
    )
