"""A real Slurm on this one machine: `python -m slurm.devcluster up`, `status`, `down`.

For tests, and for people who want to see how a job behaves in a queue: munge, slurmctld and a slurmd per node, with
GPUs that are empty device files, and accounting by slurmdbd and MariaDB on request. Everything lies in one folder and
listens on its own ports, so that several can run side by side. Needs root on Debian or Ubuntu, whose packages it
installs where they are missing.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from slurm.devcluster.cluster import DevCluster
from slurm.devcluster.lifecycle import down, load, up

DEFAULT_FOLDER = "/var/tmp/pixart-devcluster"


def describe(cluster: DevCluster) -> str:
    exports = " ".join(f"{key}={value}" for key, value in cluster.environment.items())
    return f"export {exports}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m slurm.devcluster", description=__doc__)
    parser.add_argument("command", choices=("up", "down", "status"))
    parser.add_argument("--folder", type=Path, default=Path(DEFAULT_FOLDER), help=f"(default: {DEFAULT_FOLDER})")
    parser.add_argument("--nodes", type=int, default=4, help="slurmd processes (default: 4)")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs that are only files (default: 8)")
    parser.add_argument("--accounting", action="store_true", help="with slurmdbd and a MariaDB of its own")
    options = parser.parse_args(arguments)
    try:
        if options.command == "up":
            print(describe(up(options.folder, options.nodes, options.gpus_per_node, options.accounting)))
        elif options.command == "down":
            down(options.folder)
        else:
            cluster = load(options.folder)
            print(describe(cluster), cluster.command("sinfo"), cluster.command("squeue"), sep="\n", end="")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


if __name__ == "__main__":
    sys.exit(main())
