"""The address of a server that a run has started, in a file of the run folder that only its user can read."""

import json
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pixart import records
from pixart.atomic import atomic_path

FILE = "endpoint.json"
ANY_HOST = ("0.0.0.0", "::")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Endpoint:
    """Address of a server: the node that it runs on, the address that it listens on, and its bearer token if any."""

    node: str
    host: str
    port: records.Count
    token: str | None
    job: str

    @property
    def url(self) -> str:
        """The URL on the network of the node."""
        name = self.node if self.host in ANY_HOST else self.host
        return f"http://{f'[{name}]' if ':' in name else name}:{self.port}"

    def save(self, folder: Path) -> None:
        """Write the file, atomically, with a mode that lets nobody else read the token."""
        with atomic_path(folder / FILE) as temporary:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w") as file:  # noqa: PTH123 - of a descriptor
                json.dump({"url": self.url, **asdict(self)}, file, indent=2)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())


def load(folder: Path) -> Endpoint | None:
    """Return the endpoint of a run, or None if it has none. Raises ValueError for a damaged file."""
    try:
        record = records.read(folder / FILE, dict[str, Any])
    except FileNotFoundError:
        return None
    values = {key: value for key, value in record.items() if key != "url"}
    return records.convert(values, Endpoint, str(folder / FILE))


def describe(endpoint: Endpoint, *, is_remote: bool, login_node: Callable[[], str] = socket.getfqdn) -> str:
    """Return the lines that say how to reach a server; from another machine, through the node of the launcher."""
    fragment = f"/#token={endpoint.token}" if endpoint.token else "/"
    if not is_remote:
        return f"serving: {endpoint.url}{fragment}"
    return (
        f"serving: {endpoint.url} on node {endpoint.node}\n"
        f"tunnel: ssh -N -L {endpoint.port}:{endpoint.node}:{endpoint.port} {login_node()}\n"
        f"then: http://localhost:{endpoint.port}{fragment}"
    )
