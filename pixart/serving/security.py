"""Checks of every HTTP request before the app sees it: bearer token, host, origin, size and duration of the body."""

import asyncio
import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from pixart.serving.openai_api import error_response
from pixart.serving.requests import Limits

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
PUBLIC = ("/", "/health")  # paths that need no token, and those below PUBLIC_FOLDERS
PUBLIC_FOLDERS = ("/page/", "/images/")  # the page's files, and images whose names cannot be guessed
HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (
        b"content-security-policy",
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
]


class Guard:
    """ASGI middleware that refuses requests without the token, from other sites, or with a body beyond the limits.

    Without a token, only requests that name this machine are answered: a page of another site could otherwise reach
    the server through a host name that resolves to the loopback address.
    """

    def __init__(self, app: App, *, token: str | None, limits: Limits) -> None:
        self.app, self.token, self.limits = app, token, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message["headers"]}
                message["headers"] = [*message["headers"], *(item for item in HEADERS if item[0] not in present)]
            await send(message)

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self.refusal(scope, headers)
        body = b""
        if refusal is None:
            try:
                body = await asyncio.wait_for(self.read(headers, receive), self.limits.body_seconds)
            except BodyTooLargeError:
                refusal = (413, f"the body is longer than {self.limits.body_bytes} bytes", "body_too_large")
            except TimeoutError:
                refusal = (408, f"the body did not arrive within {self.limits.body_seconds:g} s", "timeout")
            except ClientLeftError:
                return
        if refusal is not None:
            status, message, code = refusal
            response = error_response(status, message, code=code)
            if status in (408, 413):  # the rest of the body is not read
                response.headers["connection"] = "close"
            await response(scope, receive, send_with_headers)
            return

        sent = False

        async def replay() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send_with_headers)

    def refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str, str] | None:
        """Return the status, message and code of a refusal by the headers, or None."""
        host = headers.get("host", "")
        origin = headers.get("origin")
        if origin is not None and urlsplit_or_none(origin) != host:
            return 403, "requests from pages of other sites are refused", "forbidden_origin"
        if self.token is None:
            name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
            if name.strip("[]") not in LOOPBACK:
                return 421, f"this server answers requests to {', '.join(LOOPBACK)} only", "misdirected_request"
            return None
        path = scope["path"]
        if path in PUBLIC or path.startswith(PUBLIC_FOLDERS):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.token.encode()):
            return 401, "the bearer token is missing or wrong; send 'Authorization: Bearer TOKEN'", "invalid_api_key"
        return None

    async def read(self, headers: dict[str, str], receive: Receive) -> bytes:
        """Return the body. Raises BodyTooLargeError beyond the limit, before more than that is kept."""
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self.limits.body_bytes:
            raise BodyTooLargeError
        parts = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientLeftError
            parts += message.get("body", b"")
            if len(parts) > self.limits.body_bytes:
                raise BodyTooLargeError
            if not message.get("more_body"):
                return bytes(parts)


class BodyTooLargeError(Exception):
    """The body of a request is longer than the limit."""


class ClientLeftError(Exception):
    """The client closed the connection before the request was complete."""


def urlsplit_or_none(url: str) -> str | None:
    """Return the host and port of a URL, or None if it is none."""
    try:
        return urlsplit(url).netloc or None
    except ValueError:
        return None
