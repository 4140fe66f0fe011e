"""Limits, cancellation, the end of a server, and malformed requests."""

import base64
import gc
import http.client
import io
import json
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import numpy as np
import openai
import pytest
from PIL import Image

from tests.pixart.serving.test_openai_api import client
from tests.support.cluster_fixture import wait_until
from tests.support.serving_fixture import HeldSteps

pytestmark = pytest.mark.slow

PATH = "/v1/images/generations"
PROMPT = {"prompt": "a star"}


def post(url: str, **options) -> httpx2.Response:
    return httpx2.post(f"{url}{PATH}", timeout=60, **options)


def test_the_queue_has_a_limit(serve):
    server = serve(limits={"batch_size": 1, "queued_images": 2})
    held = HeldSteps(server.service)
    with ThreadPoolExecutor(4) as threads:
        first = threads.submit(post, server.url, json=PROMPT)
        held.wait()
        waiting = [threads.submit(post, server.url, json=PROMPT) for _ in range(2)]
        wait_until(lambda: server.service.queue.num_waiting == 2, 30)
        refused = post(server.url, json=PROMPT)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["error"]["type"] == "rate_limit_error"
        with pytest.raises(openai.RateLimitError, match="queue is full"):
            client(server).images.generate(prompt="a star")
        held.release()
        assert [task.result().status_code for task in (first, *waiting)] == [200] * 3
    assert post(server.url, json=PROMPT).status_code == 200


def test_a_client_that_leaves_frees_its_place(serve):
    """In the batch, in the queue, and in a stream."""
    server = serve(limits={"batch_size": 1, "queued_images": 1})
    held = HeldSteps(server.service)
    address = urlsplit(server.url)

    def leave(body: dict) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(address.hostname, address.port)
        connection.request("POST", PATH, json.dumps(body), {"Content-Type": "application/json"})
        return connection

    running = leave({**PROMPT, "steps": 50})
    held.wait()
    queued = leave(PROMPT)
    wait_until(lambda: server.service.queue.num_waiting == 1, 30)
    assert post(server.url, json=PROMPT).status_code == 429
    queued.close()
    wait_until(lambda: server.service.queue.num_waiting == 0, 30)
    running.close()
    wait_until(lambda: all(job.is_cancelled for job, *_ in server.service.engine.active), 30)
    held.release(1)
    wait_until(lambda: server.service.queue.is_idle, 30)  # after one step of 50

    streaming = leave({**PROMPT, "steps": 50, "stream": True, "partial_images": 10})
    held.wait()
    held.release(10)
    assert streaming.getresponse().readline().startswith(b"event: image_generation.partial_image")
    streaming.sock.shutdown(socket.SHUT_RDWR)
    streaming.close()
    wait_until(lambda: all(job.is_cancelled for job, *_ in server.service.engine.active), 30)
    held.release()
    wait_until(lambda: server.service.queue.is_idle, 30)
    assert post(server.url, json=PROMPT).status_code == 200
    text = httpx2.get(f"{server.url}/metrics").text
    assert "pixart_cancelled_requests_total 3.0" in text


def test_a_request_has_a_time_limit(serve):
    server = serve(limits={"request_seconds": 0.3})
    held = HeldSteps(server.service)
    answer = post(server.url, json=PROMPT)
    assert answer.status_code == 504
    assert answer.json()["error"] == {
        "message": "the images were not ready after 0.3 s",
        "type": "server_error",
        "param": None,
        "code": "timeout",
    }
    held.release()
    wait_until(lambda: server.service.queue.is_idle, 30)


def test_requests_of_other_settings_share_a_batch(serve, text_server):
    """Images join a running batch between its steps, with other steps and guidance, and wait for other weights."""
    server = serve(weights=("ema", "master"))
    held = HeldSteps(server.service)
    bodies = [
        {**PROMPT, "seed": 1, "steps": 6},
        {**PROMPT, "seed": 2, "steps": 3, "guidance": 1},
        {"prompt": "a circle", "seed": 3, "steps": 4, "guidance": 5.5},
        {**PROMPT, "seed": 4, "weights": "master"},
    ]
    with ThreadPoolExecutor(4) as threads:
        answers = [threads.submit(post, server.url, json=bodies[0])]
        held.wait()
        for number, body in enumerate(bodies[1:], 1):
            answers.append(threads.submit(post, server.url, json=body))
            wait_until(lambda: server.service.queue.num_waiting == number, 30)  # noqa: B023
        held.release()
        entries = [answer.result().json()["data"][0] for answer in answers]
    assert [entry["batch_size"] for entry in entries] == [3, 3, 3, 1]
    for body, entry in zip(bodies, entries, strict=True):
        alone = post(text_server.url, json=body).json()["data"][0]
        first, second = (
            np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"])))).astype(int)
            for item in (entry, alone)
        )
        assert np.abs(first - second).max() <= 1


def test_the_end_finishes_begun_images(serve):
    server = serve(limits={"batch_size": 2})
    held = HeldSteps(server.service)
    with ThreadPoolExecutor(4) as threads:
        begun = threads.submit(post, server.url, json={**PROMPT, "n": 3})
        held.wait()
        queued = threads.submit(post, server.url, json=PROMPT)
        wait_until(lambda: server.service.queue.num_waiting == 2, 30)
        server.stopping.set()
        refused = queued.result()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "ending")
        assert refused.headers["retry-after"] == "30"
        held.release()
        assert len(begun.result().json()["data"]) == 3
    assert server.stop() == "stopped"
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{server.url}/health")


def test_an_idle_server_ends(serve):
    server = serve(idle_seconds=0.5)
    assert post(server.url, json=PROMPT).status_code == 200
    server.thread.join(60)
    assert server.reasons == ["idle"]


def test_an_error_of_a_batch_fails_its_requests_alone(serve):
    server = serve()
    step = server.service.engine.step

    def failing_step() -> None:
        server.service.engine.step = step
        raise RuntimeError("secret: out of memory")

    server.service.engine.step = failing_step
    answer = post(server.url, json=PROMPT)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert post(server.url, json=PROMPT).status_code == 200


def test_a_token_protects_everything_but_the_page_and_health(serve):
    server = serve(token="secret")
    assert post(server.url, json=PROMPT).json()["error"]["code"] == "invalid_api_key"
    for path in ("/metrics", "/v1/models", "/lineage", "/page/../metrics"):
        assert httpx2.get(f"{server.url}{path}").status_code in (401, 404)
    for path in ("/", "/health", "/page/page.js"):
        assert httpx2.get(f"{server.url}{path}").status_code == 200
    for key in ("secre", "secret2", "Secret", "sécret"):
        headers = {"Authorization": f"Bearer {key}".encode()}
        assert httpx2.get(f"{server.url}/v1/models", headers=headers).status_code == 401
    with pytest.raises(openai.AuthenticationError):
        client(server, "wrong").models.list()
    (image,) = client(server, "secret").images.generate(prompt="a star", response_format="url").data
    assert httpx2.get(image.url).headers["content-type"] == "image/png"
    assert httpx2.get(f"{server.url}/images/AAAA.png").status_code == 404


def test_other_sites_are_refused(text_server):
    """A page of another site, also by a host name that resolves to this machine."""
    host = urlsplit(text_server.url).netloc
    assert post(text_server.url, json=PROMPT, headers={"Origin": f"http://{host}"}).status_code == 200
    for headers, status in (
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "evil.example"}, 421),
        ({"Host": f"evil.example:{urlsplit(text_server.url).port}"}, 421),
    ):
        assert post(text_server.url, json=PROMPT, headers=headers).status_code == status


def test_pages_have_a_policy_without_scripts_of_others(text_server):
    headers = httpx2.get(text_server.url).headers
    policy = dict(part.strip().partition(" ")[::2] for part in headers["content-security-policy"].split(";"))
    assert (policy["default-src"], policy["script-src"], policy["connect-src"]) == ("'none'", "'self'", "'self'")
    assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY")


def test_a_slow_body_is_refused(serve):
    server = serve(limits={"body_seconds": 0.3})
    address = urlsplit(server.url)
    with socket.create_connection((address.hostname, address.port)) as connection:
        header = f"POST {PATH} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: 100\r\n\r\n{{"
        connection.sendall(header.encode())
        assert connection.recv(1000).startswith(b"HTTP/1.1 408")


def resident_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return 1024 * int(line.split()[1])


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def malformed(number: int, random_bytes: random.Random) -> bytes | str:
    """Return the body of a malformed request; `number` chooses its kind."""
    valid = {"prompt": "a star", "n": 1, "size": "64x64", "steps": 1, "guidance": 1.0, "seed": 0}
    wrong = [None, True, [], {}, "", " ", -1, 0, 1e999, 2**70, 1.5, ["a"], {"a": 1}, "\ud800", "\x00", "a" * 5000]
    name = random_bytes.choice(list(valid))
    kinds = [
        lambda: random_bytes.randbytes(random_bytes.randrange(200)),
        lambda: json.dumps(valid)[: random_bytes.randrange(1, len(json.dumps(valid)))],
        lambda: b"[" * random_bytes.randrange(1, 60_000),
        lambda: b'{"prompt": ' + b'{"a":' * 10_000,
        lambda: json.dumps(random_bytes.choice([1, None, [valid], "a", True])),
        lambda: json.dumps({**valid, name + "_": 1}),
        lambda: json.dumps({**valid, "prompt": random_bytes.choice(wrong)}),
        lambda: json.dumps({**valid, "n": random_bytes.choice([0, -1, 1.5, "1", 9, 2**70, True, []])}),
        lambda: json.dumps({**valid, "guidance": random_bytes.choice([-1, "1", 1e999, float("nan"), []])}),
        lambda: json.dumps({**valid, "seed": random_bytes.choice([-1, 2**63, 1.5, "1", True])}),
        lambda: json.dumps({**valid, "size": random_bytes.choice(["1x1", "64x", "x", "64x64x64", 64])}),
        lambda: b"a" * random_bytes.randrange(65_537, 100_000),
        lambda: b'{"prompt": "a", "seed": ' + b"9" * 6000 + b"}",
        lambda: json.dumps(valid).encode("utf-16"),
    ]
    return kinds[number % len(kinds)]()


def test_malformed_requests_are_refused_without_a_leak(text_server):
    """1,000 of them: 4xx each, none reaches the queue, and memory, threads and connections stay as they were."""
    random_bytes = random.Random(0)
    address = urlsplit(text_server.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)

    def send(count: int) -> set[int]:
        statuses = set()
        for number in range(count):
            connection.request("POST", PATH, malformed(number, random_bytes), {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert response.read()
            statuses.add(response.status // 100)
        return statuses

    assert send(200) == {4}  # fills caches
    gc.collect()
    before = resident_bytes(), threading.active_count(), num_descriptors()
    assert send(1000) == {4}
    gc.collect()
    assert resident_bytes() - before[0] < 30e6
    assert (threading.active_count(), num_descriptors()) <= (before[1] + 1, before[2] + 2)
    connection.close()
    assert text_server.service.queue.is_idle
    for text in (b"\x00\xff\r\n\r\n", b"GET\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
            connection.sendall(text)
            assert connection.recv(100).startswith(b"HTTP/1.1 4")
    for method, path, status in (("GET", PATH, 405), ("POST", "/", 405), ("GET", "/nothing", 404), ("PUT", "/v1", 404)):
        answer = httpx2.request(method, f"{text_server.url}{path}")
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, "invalid_request_error")
    assert post(text_server.url, json=PROMPT).status_code == 200


def test_stored_images_are_bounded(serve):
    server = serve(limits={"stored_images": 2})
    urls = [
        client(server).images.generate(prompt="a star", response_format="url", extra_body={"steps": 1}).data[0].url
        for _ in range(3)
    ]
    assert [httpx2.get(url).status_code for url in urls] == [404, 200, 200]
