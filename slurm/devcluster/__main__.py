"""Development cluster: a real Slurm on one machine, by `python -m slurm.devcluster up`, `status`, `down`.

It is used by tests and for trying out jobs in a queue. It runs munge, slurmctld and one slurmd per node, with device
files in place of GPUs, and on request accounting by slurmdbd and MariaDB. A cluster keeps its files in one folder and
listens on separate ports, so that several can run side by side. It needs root on Debian or Ubuntu, and installs the
packages that are missing.
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
    """Return the shell command that exports the cluster's environment variables."""
    exports = " ".join(f"{key}={value}" for key, value in cluster.environment.items())
    return f"export {exports}"


def make_parser() -> "Parser":
    """Return the parser of the command line."""
    parser = Parser(prog="python -m slurm.devcluster", description=__doc__)
    parser.add_argument("command", choices=("up", "down", "status"), help="Start, stop or show the cluster.")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(DEFAULT_FOLDER),
        metavar="FOLDER",
        help=f"Folder of the cluster's files (default: {DEFAULT_FOLDER}).",
    )
    parser.add_argument(
        "--nodes", type=int, default=4, metavar="N", help="Number of nodes, each a slurmd process (default: 4)."
    )
    parser.add_argument(
        "--gpus-per-node", type=int, default=8, metavar="N", help="Number of simulated GPUs per node (default: 8)."
    )
    parser.add_argument(
        "--accounting", action="store_true", help="Run slurmdbd with a separate MariaDB (default: no accounting)."
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
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
    """An argparse parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


if __name__ == "__main__":
    sys.exit(main())
