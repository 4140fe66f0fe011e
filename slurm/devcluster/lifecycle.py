"""Start and stop a development cluster: its packages, daemons and processes."""

import json
import os
import shutil
import signal
import socket
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from slurm.devcluster import files, packages
from slurm.devcluster.cluster import DevCluster

PACKAGES = {"slurmctld": "slurm-wlm", "munged": "munge"}
ACCOUNTING_PACKAGES = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server"}


def up(folder: Path, nodes: int = 4, gpus_per_node: int = 8, accounting: bool = False) -> DevCluster:
    """Start a cluster and return when all its nodes are idle.

    Raises ValueError if the folder already has one, or if it cannot run there.
    """
    folder = folder.absolute()
    if nodes < 1 or gpus_per_node < 0:
        raise ValueError(f"--nodes {nodes} --gpus-per-node {gpus_per_node}: must be at least 1 node and 0 GPUs")
    if (folder / "cluster.json").exists():
        raise ValueError(
            f"--folder {folder}: already holds a cluster; run `python -m slurm.devcluster down` to stop it"
        )
    check_path(folder)
    packages.install({**PACKAGES, **(ACCOUNTING_PACKAGES if accounting else {})})
    for name in ("state", "spool", "logs", "devices"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    folder.chmod(0o755)
    services = ["controller", "accounting", "database", *(f"n{index}" for index in range(1, nodes + 1))]
    ports = dict(zip(services, free_ports(len(services)), strict=True))
    cluster = DevCluster(folder=folder, nodes=nodes, gpus_per_node=gpus_per_node, accounting=accounting, ports=ports)
    (folder / "cluster.json").write_text(json.dumps({**asdict(cluster), "folder": str(folder)}, indent=2) + "\n")
    try:
        files.write(cluster)
        start_munge(cluster)
        if accounting:
            start_accounting(cluster)
        cluster.start_controller()
        for name in cluster.names:
            cluster.start_node(name)
        cluster.wait_for(
            "the nodes",
            lambda: cluster.command("sinfo", "-h", "-N", "-p", files.PARTITION, "-o", "%t").split() == ["idle"] * nodes,
        )
    except BaseException:
        down(folder, keep=True)
        raise
    return cluster


def check_path(folder: Path) -> None:
    """Check that this user can run a cluster in the folder. Raises ValueError otherwise."""
    if os.geteuid() != 0:
        raise ValueError("slurm.devcluster: its daemons need root; use sudo or a container")
    if any(character.isspace() or character in ",=%#\\" for character in str(folder)):
        raise ValueError(
            f"--folder {str(folder)!r}: Slurm allows no whitespace and none of ,=%#\\ in this path; rename it"
        )
    if len(str(folder)) > 80:
        raise ValueError(f"--folder {folder}: too long for the path of a socket; use at most 80 characters")


def free_ports(count: int) -> list[int]:
    """Return distinct ports on which no process listens at present."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()


def start_munge(cluster: DevCluster) -> None:
    """Start munged with a new key and wait until it answers."""
    folder = cluster.folder
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    paths = {
        "socket": folder / "munge.socket",
        "key-file": key,
        "pid-file": folder / "munged.pid",
        "log-file": folder / "logs" / "munged.log",
        "seed-file": folder / "munge.seed",
    }
    options = [f"--{name}={path}" for name, path in paths.items()]
    cluster.start("munged", "munged", "--foreground", "--force", *options)
    cluster.wait_for("munged", lambda: bool(cluster.command("munge", "-n", "-S", str(folder / "munge.socket"))))


def start_accounting(cluster: DevCluster) -> None:
    """Start MariaDB and slurmdbd, and register the cluster for accounting."""
    data = cluster.folder / "database"
    data.mkdir()
    cluster.command("mariadb-install-db", "--no-defaults", f"--datadir={data}", "--user=root", "--skip-test-db")
    options = [f"--datadir={data}", f"--socket={data}/socket", f"--port={cluster.ports['database']}"]
    options += ["--bind-address=127.0.0.1", "--user=root", f"--pid-file={data}/mariadbd.pid"]
    cluster.start("mariadbd", "mariadbd", "--no-defaults", *options)
    grant = "CREATE USER slurm@'127.0.0.1' IDENTIFIED BY 'slurm'; GRANT ALL ON slurm_acct.* TO slurm@'127.0.0.1'"
    client = ("mariadb", "--no-defaults", f"--socket={data}/socket")
    cluster.wait_for("mariadbd", lambda: bool(cluster.command(*client, "-e", "SELECT 1")))
    cluster.command(*client, "-e", grant)
    # slurmdbd reads slurmdbd.conf from the folder of SLURM_CONF.
    cluster.start("slurmdbd", "slurmdbd", "-D")
    cluster.wait_for("slurmdbd", lambda: is_listening(cluster.ports["accounting"]))
    name = f"dev{cluster.ports['controller']}"
    cluster.wait_for("accounting", lambda: bool(cluster.command("sacctmgr", "-i", "add", "cluster", name)))


def is_listening(port: int) -> bool:
    """Return True if a local port accepts connections. Raises OSError otherwise."""
    with socket.create_connection(("127.0.0.1", port), timeout=1):
        return True


def load(folder: Path) -> DevCluster:
    """Return the cluster that was started in a folder. Raises ValueError if the folder has no cluster."""
    try:
        values = json.loads((folder.absolute() / "cluster.json").read_text())
    except FileNotFoundError:
        raise ValueError(
            f"--folder {folder}: holds no cluster; run `python -m slurm.devcluster up` to start one"
        ) from None
    return DevCluster(**{**values, "folder": Path(values["folder"])})


def down(folder: Path, *, keep: bool = False) -> None:
    """Stop a cluster and its jobs, and remove its folder.

    With `keep`, only cluster.json is removed, so that the logs remain. Raises ValueError if there is no cluster.
    """
    cluster = load(folder)
    for number, seconds in ((signal.SIGTERM, 3), (signal.SIGKILL, 10)):  # slurmstepd ends only on SIGKILL
        deadline = time.monotonic() + seconds
        while pids := processes(cluster):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            if time.monotonic() > deadline:
                break
            time.sleep(0.2)
    (cluster.folder / "cluster.json").unlink()
    if not keep:
        shutil.rmtree(cluster.folder)


def processes(cluster: DevCluster) -> list[int]:
    """Return the process ids of the cluster's daemons and of its jobs' processes.

    They are recognized by the SLURM_CONF in their environment.
    """
    marker = f"SLURM_CONF={cluster.folder}/slurm.conf".encode()
    daemons = {b"munged", b"slurmctld", b"slurmd", b"slurmdbd", b"mariadbd", b"slurmstepd", b"slurmstepd:"}
    pids = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            variables = (path / "environ").read_bytes().split(b"\0")
            program = (path / "cmdline").read_bytes().split(b"\0")[0].split(b" ")[0].rpartition(b"/")[2]
        except OSError:
            continue  # the process has ended
        in_job = any(variable.startswith(b"SLURM_JOB_ID=") for variable in variables)
        if marker in variables and (in_job or program in daemons) and int(path.name) != os.getpid():
            pids.append(int(path.name))
    return pids
