"""The rendezvous of the ranks of a training job."""

import random
from pathlib import Path

from jobs.tasks.train import PORTS, rendezvous_port


def test_rendezvous_port_is_outside_of_the_ephemeral_range():
    """The port is below the ephemeral range for every number that submitit draws, 20,000 to 60,000.

    Different jobs rarely have the same port.
    """
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = [rendezvous_port(random.Random(job).randint(20_000, 60_000)) for job in range(1000)]
    assert all(20_000 <= port < first for port in ports)
    assert len(set(ports)) > 900
    assert {rendezvous_port(number) for number in range(20_000, 60_001)} == set(PORTS)
