"""Load on a server: throughput against batched sampling, latency, the limit of the queue, and memory.

    python -m benchmarks.serving CHECKPOINT

Clients send requests for one image each, without a pause, and try again after the answer 429 when its Retry-After is
over. The peer is what `sample` does in batches: the same pipeline, with the images saved. It is measured in the same
run, before and after the load, and on the same half of the processors as the server; the clients have the other half.
"""

import argparse
import http.client
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.measure import GIB, RESULTS, Page, device_name
from jobs.state import endpoint as endpoints
from jobs.state import run as runs
from pixart.demo.scenes import caption, make_scene
from pixart.recipes import RECIPES

PATH = "/v1/images/generations"
CLIENTS, SECONDS, MAX_QUEUE = 64, 60.0, 40
WARM_UP_SECONDS = 5.0  # of load before the measurement
PEER_IMAGES = 256
REQUEST_SECONDS = 120.0


@dataclass(kw_only=True)
class Load:
    """What clients have seen: statuses with their counts, and the seconds of each answered request."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # answers that break the API's promise
    duration: float = 0.0

    @property
    def rate(self) -> float:
        """Images per second."""
        return len(self.seconds) / self.duration

    @property
    def p95(self) -> float:
        """The 95th percentile of the seconds of a request that was answered by an image."""
        return float(np.quantile(self.seconds, 0.95))


def load(url: str, clients: int, seconds: float, body: dict[str, Any] | None = None) -> Load:
    """Send requests by `clients` threads for `seconds`, and return what they have seen."""
    result, lock, address = Load(), threading.Lock(), urlsplit(url)
    end = time.perf_counter() + seconds

    def send(client: int) -> None:
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=REQUEST_SECONDS)
        number = 0
        while (begun := time.perf_counter()) < end:
            prompt = caption(make_scene(client, number))
            content = json.dumps({**(body or {}), "prompt": prompt, "seed": number})
            connection.request("POST", PATH, content, {"Content-Type": "application/json"})
            response = connection.getresponse()
            data, finished = response.read(), time.perf_counter()
            number += 1
            with lock:
                result.statuses[response.status] += 1
                if response.status == 200 and finished < end:
                    result.seconds.append(finished - begun)
                if fault := check(response, data):
                    result.faults.append(fault)
            if response.status == 429:
                connection.close()  # the server closes a connection that is idle for longer than its limit
                time.sleep(max(0.0, min(float(response.headers["Retry-After"]), end - time.perf_counter())))
        connection.close()

    begun = time.perf_counter()
    threads = [threading.Thread(target=send, args=(client,)) for client in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    result.duration = min(seconds, time.perf_counter() - begun)
    return result


def halves() -> tuple[list[int], list[int]]:
    """Return the processors for the server and those for its clients: all for both where there is one alone."""
    every = sorted(os.sched_getaffinity(0))
    middle = len(every) // 2
    return every[:middle] or every, every[middle:]


@contextmanager
def processors(chosen: Collection[int]) -> Iterator[None]:
    """Let this thread, and the processes and threads that it starts in the block, use the given processors alone."""
    before, threads = os.sched_getaffinity(0), os.environ.get("OMP_NUM_THREADS")
    os.sched_setaffinity(0, chosen)
    os.environ["OMP_NUM_THREADS"] = f"{len(chosen)}"
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        os.environ.pop("OMP_NUM_THREADS")
        if threads is not None:
            os.environ["OMP_NUM_THREADS"] = threads


def check(response: http.client.HTTPResponse, data: bytes) -> str:
    """Return what is wrong with an answer, or ""."""
    if response.status == 200:
        return "" if json.loads(data)["data"][0]["b64_json"] else "no image"
    if response.status == 429:
        is_right = response.headers.get("Retry-After", "").isdecimal() and b"rate_limit_error" in data
        return "" if is_right else "429 without Retry-After"
    return f"{response.status}: {data[:200]!r}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Images that were made, with the wall time and the processor time that they took, in seconds."""

    images: int
    seconds: float
    cpu_seconds: float


def sample_in_batches(checkpoint: str) -> Work:
    """Return the work of batched sampling with the images saved, as `sample` does it, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.serving", checkpoint, "--peer"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Work(**json.loads(done.stdout.splitlines()[-1]))


def measure_peer(checkpoint: str) -> Work:
    """Sample PEER_IMAGES images in batches and save them; see `sample_in_batches`."""
    from pixart.checkpoint.directory import read_metadata
    from pixart.data import manifest as manifests
    from pixart.sampling.images import BATCH_SIZE, SampleRequest, generate
    from pixart.sampling.loading import find, load_pipeline
    from pixart.sampling.png import save_png

    directory = find(checkpoint)
    pipeline = load_pipeline(directory, "ema", manifests.read(read_metadata(directory)["dataset"]))
    sample = RECIPES["demo"]("home").sample

    def sample_images(count: int, folder: str) -> None:
        pictures = [SampleRequest(seed=index, prompt=caption(make_scene(9, index))) for index in range(count)]
        for index, image in enumerate(generate(pipeline, pictures, steps=sample.steps, guidance=sample.guidance)):
            save_png(image, Path(folder) / f"{index}.png", pictures[index].settings())

    with tempfile.TemporaryDirectory() as folder:
        sample_images(BATCH_SIZE, folder)
        begun, cpu = time.perf_counter(), time.process_time()
        sample_images(PEER_IMAGES, folder)
        return Work(images=PEER_IMAGES, seconds=time.perf_counter() - begun, cpu_seconds=time.process_time() - cpu)


def resident_bytes(process: int) -> int:
    """Return the resident memory of a process."""
    status = Path(f"/proc/{process}/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


def cpu_seconds(process: int) -> float:
    """Return the processor time of a process since its start."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")  # user and system


class ServerProcess:
    """A server of `serve` in processes of its own, as a user starts it; a context manager."""

    def __init__(self, checkpoint: str, home: Path, *words: str) -> None:
        command = [sys.executable, "-m", "jobs.launch", "serve", checkpoint, "--port", "0", "--home", str(home), *words]
        environment = {**os.environ, "PIXART_CLUSTER": os.environ.get("PIXART_CLUSTER", "local")}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line.startswith("serving: "):
            raise ValueError(f"the server did not start: {line}")
        self.url = line.split()[1].rstrip("/")
        self.folder = runs.folders(home)[-1]
        endpoint = endpoints.load(self.folder)
        assert endpoint  # printed by the line above
        self.worker = int(endpoint.job)

    def __enter__(self) -> "ServerProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="run folder or checkpoint of stage 2")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--max-queue", type=int, default=MAX_QUEUE)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer:
        print(json.dumps(asdict(measure_peer(arguments.checkpoint))))
    else:
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """Measure the peer, the load and the peer again, and write the page."""
    words = ["--recipe", "demo", "--max-queue", str(arguments.max_queue)]
    served, others = halves()
    with tempfile.TemporaryDirectory() as name:
        with processors(served):
            peers = [sample_in_batches(arguments.checkpoint)]
            server = ServerProcess(arguments.checkpoint, Path(name), *words)
        with server, processors(others):
            load(server.url, arguments.clients, WARM_UP_SECONDS)
            memory, cpu = [resident_bytes(server.worker)], cpu_seconds(server.worker)
            seen = load(server.url, arguments.clients, arguments.seconds)
            cpu = cpu_seconds(server.worker) - cpu
            memory.append(resident_bytes(server.worker))
    with processors(served):
        peers.append(sample_in_batches(arguments.checkpoint))
    rates = [peer.images / peer.seconds for peer in peers]
    costs = [peer.cpu_seconds / peer.images for peer in peers]
    cost = cpu / seen.statuses[200]
    page = Page(
        arguments.out,
        "serving",
        [
            f"# Load on a server, on {device_name()}",
            "",
            f"{arguments.clients} clients for {arguments.seconds:g} s, at most {arguments.max_queue} waiting images,",
            "the demo's model; `python -m benchmarks.serving`. The server and batched sampling have the same",
            f"{len(served)} of {len({*served, *others})} processors, the clients the others.",
        ],
        ["quantity", "value"],
    )
    page.row("images/s of the server", f"{seen.rate:.1f}")
    page.row("images/s of batched sampling with images saved, before and after", f"{rates[0]:.1f}, {rates[1]:.1f}")
    page.row("throughput relative to batched sampling", f"{seen.rate / float(np.mean(rates)):.2f}")
    page.row("processor time per image of the server", f"{1000 * cost:.1f} ms")
    page.row(
        "the same of batched sampling, before and after", " ms, ".join(f"{1000 * one:.1f}" for one in costs) + " ms"
    )
    page.row("images per processor time relative to batched sampling", f"{float(np.mean(costs)) / cost:.2f}")
    page.row("median and 95th percentile of a request", f"{np.median(seen.seconds):.2f} s, {seen.p95:.2f} s")
    page.row("answers by status", ", ".join(f"{status}: {count}" for status, count in sorted(seen.statuses.items())))
    page.row("answers that break the API's promise", str(len(seen.faults)))
    page.row("resident memory at the start and end", " GiB, ".join(f"{value / GIB:.3f}" for value in memory) + " GiB")


if __name__ == "__main__":
    main()
