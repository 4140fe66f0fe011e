"""Checks of the nodes before training, by all ranks: a matrix product, its values, and an all-reduce.

A rank that fails a check, or computes much slower than the median of the ranks, makes its node bad. All checks together
take less than a minute, whatever a node does.
"""

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from statistics import median

TIMEOUT_SECONDS = 50.0  # for all ranks to report
GPU_SIZE, CPU_SIZE = 8192, 256  # side of the square matrices, of 1.1 and 0.00003 PFLOP
REPEATS = 10  # products in one measurement
MEASUREMENTS = 3  # of which the fastest counts, since other processes only slow it down
GPU_ELEMENTS, CPU_ELEMENTS = 64 << 20, 1 << 20  # of the all-reduce, in float32


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Result of one rank: the seconds of its matrix products, or the error that it met."""

    rank: int
    node: str
    seconds: float = 0.0
    error: str = ""


def run(
    rank: int,
    world_size: int,
    node: str,
    address: tuple[str, int],
    *,
    local_rank: int = 0,
    max_slowdown: float,
    node_check: Callable[[], str] = lambda: "",
) -> dict[str, str]:
    """Check all nodes and return the bad ones with the reasons; every rank calls it and gets the same result.

    `address` is a host and port of rank 0 for this call alone; `max_slowdown` is the largest seconds of a rank relative
    to the median; `node_check` returns the error of a check that is specific to the cluster, and is called by the first
    rank of each node. A rank that does not report is named "rank R", since its node is not known.
    Raises RuntimeError if rank 0 cannot be reached, or the all-reduce fails although every node passed.
    """
    import torch.distributed as dist

    report = local_report(rank, node, node_check if local_rank == 0 else lambda: "", local_rank)
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    try:
        store = dist.TCPStore(*address, world_size, rank == 0, timeout=timeout, wait_for_workers=False)
        store.set(f"report/{rank}", json.dumps(asdict(report)))
        if rank == 0:
            bad = judge(collect(store, world_size), max_slowdown)
            store.set("bad", json.dumps(bad))
        bad = json.loads(store.get("bad"))
        if not bad and world_size > 1:
            all_reduce(store, rank, world_size, local_rank)
        store.set(f"ended/{rank}", "")
        if rank == 0:  # it serves the store until the others have read it
            with suppress(dist.DistStoreError):
                store.wait([f"ended/{other}" for other in range(world_size)], timedelta(seconds=10))
    except (dist.DistError, RuntimeError) as error:
        raise RuntimeError(f"preflight: rank {rank} on {node}: {str(error).splitlines()[0]}") from error
    return bad


def local_report(rank: int, node: str, node_check: Callable[[], str], local_rank: int) -> Report:
    """Run the checks of this rank alone, and report the first error."""
    try:
        if error := node_check():
            return Report(rank=rank, node=node, error=error)
        return Report(rank=rank, node=node, seconds=matrix_product(local_rank))
    except Exception as error:  # whatever a broken node raises is what is reported
        return Report(rank=rank, node=node, error=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


def matrix_product(local_rank: int = 0) -> float:
    """Return the seconds of a matrix product, of all those measured the fastest.

    Raises ArithmeticError if a value is wrong or not finite.
    """
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    size, dtype = (GPU_SIZE, torch.bfloat16) if cuda else (CPU_SIZE, torch.float32)
    # Every row of a times every column of b is the number of its even columns, exactly, whatever the order of the sums.
    a = torch.arange(size, device=device).remainder(2).to(dtype).expand(size, size).contiguous()
    b = torch.ones(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(MEASUREMENTS + 1):  # the first one is a warm-up
        begun = time.perf_counter()
        for _ in range(REPEATS):
            product = a @ b
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append((time.perf_counter() - begun) / REPEATS)
    if not torch.isfinite(product).all():
        raise ArithmeticError("a matrix product has values that are not finite")
    if not (product == size // 2).all():
        raise ArithmeticError("a matrix product has wrong values")
    return min(seconds[1:])


def collect(store, world_size: int) -> list[Report]:
    """Return the reports of all ranks; the error of one that does not report in time says so."""
    import torch.distributed as dist

    reports, deadline = [], time.monotonic() + TIMEOUT_SECONDS
    for rank in range(world_size):
        try:
            store.wait([f"report/{rank}"], timedelta(seconds=max(0.1, deadline - time.monotonic())))
            reports.append(Report(**json.loads(store.get(f"report/{rank}"))))
        except dist.DistStoreError:
            reports.append(Report(rank=rank, node=f"rank {rank}", error=f"no report within {TIMEOUT_SECONDS:.0f} s"))
    return reports


def judge(reports: Sequence[Report], max_slowdown: float) -> dict[str, str]:
    """Return the bad nodes with the reasons: of ranks with an error, or over `max_slowdown` medians of the seconds."""
    bad = {report.node: report.error for report in reports if report.error}
    passed = [report for report in reports if not report.error]
    typical = median(report.seconds for report in passed) if passed else 0.0
    for report in passed:
        if report.seconds > max_slowdown * typical:
            slowdown = report.seconds / typical
            bad.setdefault(report.node, f"a matrix product takes {slowdown:.1f} times the median of the ranks")
    return bad


def all_reduce(store, rank: int, world_size: int, local_rank: int) -> None:
    """Sum a large tensor over all ranks. Raises RuntimeError if a value is wrong, or if it takes too long."""
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    try:
        values = torch.full((GPU_ELEMENTS if cuda else CPU_ELEMENTS,), float(rank), device=device)
        dist.all_reduce(values)
        if not (values == world_size * (world_size - 1) // 2).all():
            raise RuntimeError("an all-reduce has wrong values")
    finally:
        dist.destroy_process_group()
