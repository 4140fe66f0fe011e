"""The checks of nodes before training, on ranks that are processes of this machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pixart import preflight
from pixart.preflight import Report
from slurm.devcluster.lifecycle import free_ports

ROOT = Path(__file__).parents[2]
RANK = """
import json, sys
from pixart import preflight
preflight.TIMEOUT_SECONDS = float(sys.argv[4])
rank, port, world_size = map(int, sys.argv[1:4])
check = (lambda: "the GPU fell off the bus") if sys.argv[5] == str(rank) else (lambda: "")
print(json.dumps(preflight.run(rank, world_size, f"n{rank}", ("127.0.0.1", port), max_slowdown=50, node_check=check)))
"""


def test_slow_nodes_and_nodes_with_errors_are_bad():
    reports = [
        Report(rank=0, node="n1", seconds=1.0),
        Report(rank=1, node="n1", seconds=1.1),
        Report(rank=2, node="n2", seconds=1.0),
        Report(rank=3, node="n2", seconds=2.1),
        Report(rank=4, node="n3", error="CUDA error"),
    ]
    bad = preflight.judge(reports, 1.5)
    assert bad == {"n2": "a matrix product takes 2.0 times the median of the ranks", "n3": "CUDA error"}
    assert preflight.judge(reports[:3], 1.5) == {}


def test_errors_of_a_rank_are_reported(monkeypatch):
    def fail(local_rank: int) -> float:
        raise RuntimeError("CUDA error: an illegal memory access\ndetails")

    monkeypatch.setattr(preflight, "matrix_product", fail)
    report = preflight.local_report(3, "n1", lambda: "", 0)
    assert report == Report(rank=3, node="n1", error="RuntimeError: CUDA error: an illegal memory access")


def test_wrong_values_are_errors(monkeypatch):
    import torch

    assert preflight.matrix_product() > 0
    monkeypatch.setattr(torch, "ones", lambda *size, **options: torch.full(size, torch.nan))
    with pytest.raises(ArithmeticError, match="not finite"):
        preflight.matrix_product()
    monkeypatch.setattr(torch, "ones", lambda *size, **options: torch.full(size, 2.0))
    with pytest.raises(ArithmeticError, match="wrong values"):
        preflight.matrix_product()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("started", "broken", "bad"),
    [
        ((0, 1), "none", {}),
        ((0, 1), "1", {"n1": "the GPU fell off the bus"}),
        ((0,), "none", {"rank 1": "no report within 3 s"}),
    ],
)
def test_all_ranks_agree_on_the_bad_nodes(started: tuple[int, ...], broken: str, bad: dict[str, str]):
    (port,) = free_ports(1)
    seconds = "20" if len(started) == 2 else "3"
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(port), "2", seconds, broken], stdout=subprocess.PIPE, text=True, cwd=ROOT
        )
        for rank in started
    ]
    assert [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks] == [bad] * len(started)
