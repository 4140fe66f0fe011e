"""The HTTP server of an app: it ends when it is asked to or has been idle, and finishes what runs before."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Literal

import uvicorn

from pixart.serving.app import make_app
from pixart.serving.service import Service

POLL_SECONDS = 0.1  # between two looks at the signals and the clock
KEEP_ALIVE_SECONDS = 15
MAX_CONNECTIONS = 1024
Reason = Literal["stopped", "idle"]


class Server(uvicorn.Server):
    """uvicorn's server, without handlers of signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def open_socket(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 takes a free one. Raises ValueError if the address cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio sets TCP_NODELAY only where the protocol is named; without it every answer waits 40 ms for a delayed ACK.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(MAX_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise ValueError(f"--host {host} --port {port}: {error.strerror}; name a free port, or 0 for any") from None
    return listener


def serve(
    service: Service,
    listener: socket.socket,
    *,
    token: str | None,
    should_stop: Callable[[], object],
    idle_seconds: float,
    drain_seconds: float,
    on_ready: Callable[[], None] = lambda: None,
) -> Reason:
    """Serve until `should_stop` is true or no image was requested for `idle_seconds`; 0 means no such limit.

    Then refuses further requests, finishes the images that have begun, for at most `drain_seconds`, and returns why.
    """
    config = uvicorn.Config(
        make_app(service, token=token),
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=max(1, round(drain_seconds)),
    )
    server = Server(config)

    async def run() -> Reason:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(POLL_SECONDS / 10)
        on_ready()
        reason: Reason | None = None
        while reason is None and not serving.done():
            await asyncio.sleep(POLL_SECONDS)
            if should_stop():
                reason = "stopped"
            elif idle_seconds and service.queue.is_idle and time.monotonic() - service.queue.last_used > idle_seconds:
                reason = "idle"
        service.queue.drain()
        server.should_exit = True
        await serving
        return reason or "stopped"

    service.queue.last_used = time.monotonic()
    service.engine.start()
    try:
        return asyncio.run(run())
    finally:
        service.engine.stop()
        if service.recaptioner:
            service.recaptioner.close()
