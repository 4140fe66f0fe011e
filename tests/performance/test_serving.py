"""A server under the load of many clients: throughput, the limit of the queue, and memory."""

import os
import time

import httpx2
import pytest

from benchmarks.serving import load, resident_bytes
from pixart.sampling.images import BATCH_SIZE, SampleRequest, generate
from tests.support.serving_fixture import GUIDANCE

pytestmark = pytest.mark.slow

CLIENTS, SECONDS, STEPS = 32, 4.0, 50
ROUNDS = 3  # of batched sampling, before and after the load; the slowest counts, as other processes use this machine
MAX_GROWTH = 30e6  # bytes


def batched_rate(pipeline) -> float:
    """Return the images per second of batched sampling."""
    pictures = [SampleRequest(seed=index, prompt="a red circle") for index in range(2 * BATCH_SIZE)]
    begun = time.perf_counter()
    assert len(list(generate(pipeline, pictures, steps=STEPS, guidance=GUIDANCE))) == len(pictures)
    return len(pictures) / (time.perf_counter() - begun)


def test_a_server_under_load(serve):
    """Clients share batches, are refused beyond the queue's limit only, and leave no memory behind."""
    server = serve(limits={"queued_images": 12})
    pipeline = server.service.pipelines["ema"]
    rates = [batched_rate(pipeline) for _ in range(ROUNDS)]
    load(server.url, CLIENTS, 1.0, {"steps": STEPS})
    before = resident_bytes(os.getpid())
    seen = load(server.url, CLIENTS, SECONDS, {"steps": STEPS})
    assert resident_bytes(os.getpid()) - before < MAX_GROWTH
    rates += [batched_rate(pipeline) for _ in range(ROUNDS)]
    assert seen.faults == []
    assert set(seen.statuses) == {200, 429}
    registry = server.service.metrics.registry
    sums = [registry.get_sample_value(f"pixart_batch_size_{name}") for name in ("sum", "count")]
    assert sums[0] / sums[1] > 0.7 * BATCH_SIZE
    assert seen.rate > 0.5 * min(rates)
    assert server.service.queue.is_idle
    assert httpx2.get(f"{server.url}/health").status_code == 200
