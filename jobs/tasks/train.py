"""The train job: one rank of a training run."""

import logging
import os
import subprocess
import sys
from pathlib import Path

from jobs.state import ledger, nodes
from jobs.state.journal import Journal
from jobs.state.prompts import read_prompts
from jobs.state.run_metadata import read_profile
from jobs.tasks import audit
from pixart.config import recipe as recipe_file
from pixart.config.keys import toml_file
from pixart.config.recipe import Recipe

logger = logging.getLogger(__name__)
ROOT = Path(__file__).parents[2]
SETTINGS, LOG = "evaluate.toml", "evaluations.log"  # in the run folder
MAX_EXCLUSIONS = 3  # requeues by the preflight, after which the job fails
NODE_CHECK_SECONDS = 40
PORTS = range(20_000, 32_768)  # below the default range of ephemeral ports, net.ipv4.ip_local_port_range


def run(run_folder: str, *, stage: int, start: str | None, require_audit: bool = False, preflight: bool = False) -> str:
    """Train on this rank and return the directory of the last checkpoint.

    With `preflight`, the nodes are checked before the model is built, and the job is requeued without the bad ones.
    Raises ValueError if the dataset is incomplete or, with `require_audit`, has not passed its audit, whatever the job
    waited for; TaskInterrupted after all ranks have saved, if Slurm has signalled that the job must end.
    """
    join_ranks()
    folder = Path(run_folder)
    recipe = recipe_file.load(folder / "config.json")
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

    if preflight:
        check_nodes(folder)

    from pixart.training.loop import Stopped, train
    from slurm.task import TaskInterrupted, stop_level

    evaluations = Evaluations(folder, recipe)
    prompts = read_prompts(recipe.sample.prompts, "sample.prompts") if recipe.sample.prompts and stage == 2 else []
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
            preview_prompts=[prompt["prompt"] for prompt in prompts],
            on_evaluation=evaluations.start,
        )
    except Stopped as stopped:
        raise TaskInterrupted(stopped.level) from stopped
    evaluations.wait()
    return str(last)


class Evaluations:
    """Evaluations of checkpoints beside training, each by a process of the launcher.

    On a cluster it submits jobs and ends; on this machine it computes, with the lowest priority.
    """

    def __init__(self, run: Path, recipe: Recipe) -> None:
        self.run, self.recipe = run, recipe
        self.processes: list[tuple[Path, subprocess.Popen[bytes]]] = []

    def start(self, checkpoint: Path) -> None:
        """Start the evaluation of a checkpoint by the keys evaluation.* of the run's recipe."""
        settings = self.run / SETTINGS
        settings.write_text(toml_file.dumps(self.recipe))
        home, profile = self.run.parent.parent, read_profile(self.run).name
        words = [str(checkpoint), "--home", str(home), "--config", str(settings), "--cluster", profile]
        command = ["nice", "-n", "19", sys.executable, "-m", "jobs.launch", "evaluate", *words]
        hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        with (self.run / LOG).open("ab") as log:
            process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        self.processes.append((checkpoint, process))

    def wait(self) -> None:
        """Wait for the processes; one that failed is an incident of the run, and does not fail training."""
        for checkpoint, process in self.processes:
            if process.wait():
                step = int(checkpoint.name.removeprefix("step-"))
                Journal(self.run).incident(step, f"the evaluation failed; see {self.run / LOG}")


def check_nodes(run_folder: Path) -> None:
    """Check the nodes of all ranks before training.

    Raises TaskInterrupted, for the requeue of the job without them, if some are bad; RuntimeError if they were before.
    """
    from pixart import preflight
    from slurm.task import TERMINATE, TaskInterrupted, restart_count

    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    profile = read_profile(run_folder)
    bad = preflight.run(
        rank,
        int(os.environ["WORLD_SIZE"]),
        os.environ.get("SLURMD_NODENAME", os.uname().nodename),
        (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]) + 1),
        local_rank=local_rank,
        max_slowdown=1 + profile.max_slowdown_percent / 100,
        node_check=lambda: run_node_check(profile.node_check),
    )
    if not bad:
        logger.info("preflight: all nodes passed")
        return
    described = ", ".join(f"{node} ({reason})" for node, reason in bad.items())
    if rank == 0:
        nodes.exclude(run_folder, bad)
        Journal(run_folder).incident(0, f"preflight: avoiding {described}")
        print(f"preflight: {described}", file=sys.stderr, flush=True)
    if restart_count() >= MAX_EXCLUSIONS or any(node.startswith("rank ") for node in bad):
        raise RuntimeError(f"preflight: {described}; run 'retry', which avoids the nodes that are named")
    avoided = nodes.joined(profile.exclude, ",".join({**nodes.excluded(run_folder), **bad}))
    raise TaskInterrupted(TERMINATE, exclude=avoided)


def run_node_check(command: str | None) -> str:
    """Run the profile's check of a node, and return its error: the last line that it printed; empty if it passed."""
    if not command:
        return ""
    try:
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=NODE_CHECK_SECONDS)
    except subprocess.TimeoutExpired:
        return f"node_check took over {NODE_CHECK_SECONDS} s"
    lines = [*done.stdout.splitlines(), *done.stderr.splitlines()]
    return "" if done.returncode == 0 else (lines or [f"node_check failed with exit code {done.returncode}"])[-1]


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
