"""The train job: one rank of a training run."""

import logging
import os
from pathlib import Path

from jobs.state import ledger
from jobs.state.journal import Journal
from jobs.tasks import audit
from pixart.config.recipe import from_json

logger = logging.getLogger(__name__)
PORTS = range(20_000, 32_768)  # below the default range of ephemeral ports, net.ipv4.ip_local_port_range


def run(run_folder: str, *, stage: int, start: str | None, require_audit: bool = False) -> str:
    """Train on this rank and return the directory of the last checkpoint.

    Raises ValueError if the dataset is incomplete or, with `require_audit`, has not passed its audit, whatever the job
    waited for; TaskInterrupted after all ranks have saved, if Slurm has signalled that the job must end.
    """
    join_ranks()
    recipe = from_json((Path(run_folder) / "config.json").read_text())
    if os.environ["RANK"] == "0":  # the other ranks wait for it
        ledger.require_complete(recipe.data.path)
        if require_audit:
            audit.require(recipe.data.path)

    from pixart.training.process_group import configure_logging

    configure_logging(int(os.environ["RANK"]))
    logger.info(
        "rank %s of %s, local rank %s of %s, master %s:%s",
        *(os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")),
        *(os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT")),
    )

    from pixart.training.loop import Stopped, train
    from slurm.task import TaskInterrupted, stop_level

    try:
        last = train(
            stage=stage,
            model=recipe.model,
            config=recipe.train(stage),
            dataset=recipe.data.path,
            recipe=recipe.name,
            run=run_folder,
            start=start,
            reporter=Journal(run_folder),
            stop=stop_level,
        )
    except Stopped as stopped:
        raise TaskInterrupted(stopped.level) from stopped
    return str(last)


def rendezvous_port(number: int) -> int:
    """Map the port that submitit draws, the same on every rank, to one outside of the ephemeral range.

    Most of submitit's ports are ephemeral, and on a busy machine a connection may already use such a port.
    """
    return PORTS[number % len(PORTS)]


def join_ranks() -> None:
    """Set the environment variables that torch.distributed reads.

    MASTER_ADDR and MASTER_PORT of the cluster profile take precedence over submitit's.
    """
    from submitit.helpers import TorchDistributedEnvironment

    distributed = TorchDistributedEnvironment()
    distributed.master_addr = os.environ.get("MASTER_ADDR", distributed.master_addr)
    if "MASTER_PORT" not in os.environ:
        distributed.master_port = rendezvous_port(distributed.master_port)
    distributed.export(set_cuda_visible_devices=False, overwrite=True)
