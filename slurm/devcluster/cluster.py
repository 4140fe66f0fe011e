"""Description of a development cluster: its nodes, ports and environment, and the commands that run against it."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_SECONDS = 30  # of a daemon
PATH = "/usr/sbin:/sbin:/usr/bin:/bin:" + os.environ.get("PATH", "")


@dataclass(frozen=True, kw_only=True, slots=True)
class DevCluster:
    """A development cluster in `folder`; its parameters are saved there in cluster.json."""

    folder: Path
    nodes: int
    gpus_per_node: int
    accounting: bool
    ports: dict[str, int]

    @property
    def names(self) -> list[str]:
        """Names of the nodes."""
        return [f"n{index}" for index in range(1, self.nodes + 1)]

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that select this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PIXART_CLUSTER": "dev"}

    def command(self, *words: str) -> str:
        """Run a program against this cluster and return its output.

        Raises ValueError, with the program's standard error, if it fails.
        """
        process = subprocess.run(
            words, capture_output=True, text=True, env={**os.environ, **self.environment, "PATH": PATH}
        )
        if process.returncode:
            raise ValueError(f"{words[0]} failed: {process.stderr.strip()}")
        return process.stdout

    def start(self, name: str, *words: str) -> None:
        """Start a daemon that outlives this process; its output goes to logs/NAME.out."""
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
        """Start slurmctld and wait until it answers."""
        self.start("slurmctld", "slurmctld", "-D")
        self.wait_for("slurmctld", lambda: "UP" in self.command("scontrol", "ping"))

    def restart_controller(self) -> None:
        """Kill slurmctld and start it again, as after a crash; jobs keep running meanwhile.

        Returns when all nodes have registered: before that, slurmctld rejects jobs that request GPUs.
        """
        os.kill(int((self.folder / "slurmctld.pid").read_text()), signal.SIGKILL)
        self.start_controller()
        self.wait_for("the nodes", lambda: "SlurmdStartTime=None" not in self.command("scontrol", "show", "nodes"))

    def start_node(self, name: str) -> None:
        self.start(f"slurmd-{name}", "slurmd", "-D", "-N", name)

    def wait_for(self, name: str, ready: Callable[[], bool]) -> None:
        """Poll `ready` until it is true. Raises ValueError, naming `name`, after START_TIMEOUT_SECONDS."""
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        last_error = "no answer"
        while True:
            try:
                if ready():
                    return
            except (ValueError, OSError) as error:
                last_error = str(error)
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{name}: not ready after {START_TIMEOUT_SECONDS} s ({last_error}); see {self.folder}/logs"
                )
            time.sleep(0.1)
