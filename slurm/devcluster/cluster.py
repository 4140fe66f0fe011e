"""A development cluster as its folder has it: nodes, ports, environment, and commands run against it."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SECONDS = 30  # that a daemon is given to answer
PATH = "/usr/sbin:/sbin:/usr/bin:/bin:" + os.environ.get("PATH", "")


@dataclass(frozen=True, kw_only=True, slots=True)
class DevCluster:
    """A cluster in `folder`; what it was started with lies there in cluster.json."""

    folder: Path
    nodes: int
    gpus_per_node: int
    accounting: bool
    ports: dict[str, int]

    @property
    def names(self) -> list[str]:
        return [f"n{index}" for index in range(1, self.nodes + 1)]

    @property
    def environment(self) -> dict[str, str]:
        """Variables that a process needs to talk to this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PIXART_CLUSTER": "dev"}

    def command(self, *words: str) -> str:
        """Runs a program against this cluster and returns its output. Raises ValueError with its complaint."""
        done = subprocess.run(
            words, capture_output=True, text=True, env={**os.environ, **self.environment, "PATH": PATH}
        )
        if done.returncode:
            raise ValueError(f"{words[0]} failed: {done.stderr.strip()}")
        return done.stdout

    def start(self, name: str, *words: str) -> None:
        """Starts a daemon that stays when this process ends; its output goes to its log."""
        with (self.folder / "logs" / f"{name}.out").open("ab") as log:
            subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment, "PATH": PATH},
                start_new_session=True,
            )

    def start_controller(self) -> None:
        self.start("slurmctld", "slurmctld", "-D")
        self.wait_for("slurmctld", lambda: "UP" in self.command("scontrol", "ping"))

    def restart_controller(self) -> None:
        """As a crash and a new start: jobs go on meanwhile. Returns when the nodes have made themselves known to it.

        Until then it refuses what asks for a GPU.
        """
        os.kill(int((self.folder / "slurmctld.pid").read_text()), signal.SIGKILL)
        self.start_controller()
        self.wait_for("the nodes", lambda: "SlurmdStartTime=None" not in self.command("scontrol", "show", "nodes"))

    def start_node(self, name: str) -> None:
        self.start(f"slurmd-{name}", "slurmd", "-D", "-N", name)

    def wait_for(self, what: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        answer = "no answer"
        while True:
            try:
                if ready():
                    return
            except (ValueError, OSError) as error:
                answer = str(error)
            if time.monotonic() > deadline:
                raise ValueError(f"{what} did not come up in {SECONDS} s ({answer}); logs are in {self.folder}/logs")
            time.sleep(0.1)
