"""Requests with a JSON body to a server that may be overloaded, slow or hostile: each is bounded in time and size."""

import http.client
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from pixart import records

TIMEOUT_SECONDS = 120.0  # per attempt of a request, from its beginning to the end of the response
MAX_RESPONSE_BYTES = 1 << 20  # many times a rewritten request
MAX_ATTEMPTS = 4  # per request
BACKOFF_SECONDS = 0.5  # before the second attempt, doubled before each further one
RETRY_STATUSES = (429, 500, 502, 503, 504)
REJECTED_STATUSES = (400, 413, 422)  # the server rejects this request only


class RequestRejectedError(ValueError):
    """The server rejects this request, and would reject it again."""


class SameHostRedirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects on the same host only: another one would receive the request and its credentials."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            raise urllib.error.URLError(f"it redirects to another host, {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class Connections(threading.local):
    """The sockets that this thread has opened since `close_connections_after` began; None outside of it."""

    sockets: list[socket.socket] | None = None


CONNECTIONS = Connections()


@contextmanager
def close_connections_after(seconds: float) -> Iterator[None]:
    """Shut down the connections that this thread opens in the block, if the block is not left within `seconds`.

    The timeout of a socket limits one read; a server that sends a header byte by byte would never exceed it. Raises
    TimeoutError in place of the error of a connection that was shut down.
    """
    sockets: list[socket.socket] = []
    CONNECTIONS.sockets = sockets
    expired = threading.Event()

    def shut_down() -> None:
        expired.set()
        for connection in sockets:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, shut_down)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, ValueError, http.client.HTTPException) as error:
        if expired.is_set():
            raise TimeoutError(f"its response is not complete after {seconds:g} s") from error
        raise
    finally:
        timer.cancel()
        CONNECTIONS.sockets = None


class Connection(http.client.HTTPConnection):
    """A connection that `close_connections_after` can close."""

    def connect(self) -> None:
        super().connect()
        if CONNECTIONS.sockets is not None:
            CONNECTIONS.sockets.append(self.sock)


class SecureConnection(http.client.HTTPSConnection):
    """A connection with TLS that `close_connections_after` can close."""

    def connect(self) -> None:
        super().connect()
        if CONNECTIONS.sockets is not None:
            CONNECTIONS.sockets.append(self.sock)


class Handler(urllib.request.HTTPHandler):
    """Opens HTTP connections that can be closed from another thread."""

    def http_open(self, req: Any) -> Any:
        return self.do_open(Connection, req)


class SecureHandler(urllib.request.HTTPSHandler):
    """Opens HTTPS connections that can be closed from another thread."""

    def https_open(self, req: Any) -> Any:
        return self.do_open(SecureConnection, req)


OPENER = urllib.request.build_opener(SameHostRedirects, Handler, SecureHandler)


def read_limited(response: Any) -> bytes:
    """Return the content of a response. Raises ValueError if it is too long."""
    content = response.read(MAX_RESPONSE_BYTES + 1)
    if len(content) > MAX_RESPONSE_BYTES:
        raise ValueError(f"its response is longer than {MAX_RESPONSE_BYTES} bytes")
    return content


def send_request(
    url: str, body: dict | None = None, *, seconds: float | None = None, max_attempts: int | None = None
) -> dict:
    """Return the JSON response to a GET request, or to a POST request with `body`; retry if the server is overloaded.

    Each of `max_attempts` (default: MAX_ATTEMPTS) attempts has `seconds` (default: TIMEOUT_SECONDS) until its response
    is complete. Raises RequestRejectedError if the server rejects the request itself, and ValueError for every other
    failure.
    """
    seconds = TIMEOUT_SECONDS if seconds is None else seconds
    attempts = MAX_ATTEMPTS if max_attempts is None else max_attempts
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    for attempt in range(attempts):
        try:
            with (
                close_connections_after(seconds),
                OPENER.open(urllib.request.Request(url, data, headers), timeout=seconds) as response,
            ):
                return records.parse(read_limited(response), Any, "its response")
        except urllib.error.HTTPError as error:
            message = " ".join(error.read(300).decode(errors="replace").split())
            kind = RequestRejectedError if error.code in REJECTED_STATUSES else ValueError
            failure, retry = kind(f"--server: {url} answers {error.code}: {message}"), error.code in RETRY_STATUSES
        except (OSError, ValueError, OverflowError, http.client.HTTPException) as error:  # also a length of 30 digits
            reason = getattr(error, "reason", error)
            retry = isinstance(reason, ConnectionResetError | TimeoutError | http.client.HTTPException)
            failure = ValueError(f"--server: {url} does not respond: {reason}")
        if not retry:
            break
        if attempt + 1 < attempts:
            time.sleep(BACKOFF_SECONDS * 2**attempt)
    raise failure from None
