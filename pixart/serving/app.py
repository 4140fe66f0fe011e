"""The HTTP app: OpenAI's images API, health, metrics, and the page."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse

from pixart.serving import openai_api as api
from pixart.serving.content_check import ContentError
from pixart.serving.jobs import DrainingError, Finished, Preview, QueueFullError
from pixart.serving.provenance import encode_png
from pixart.serving.recaptioning import RecaptionError
from pixart.serving.requests import ImageRequest, RequestError, parse_images, parse_prompt
from pixart.serving.security import Guard
from pixart.serving.service import Service, events

logger = logging.getLogger(__name__)
PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"page.js": "text/javascript", "page.css": "text/css"}
LINEAGE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'"
Value = TypeVar("Value")


class ClientLeftError(Exception):
    """The client closed the connection before the answer."""


def make_app(service: Service, *, token: str | None = None) -> Guard:
    """Return the ASGI app of a service; with a token, it answers only requests that have it."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.post("/v1/images/generations")
    async def generate(request: Request) -> Response:
        begun = asyncio.get_running_loop().time()
        try:
            wanted = parse_images(api.read_json(await request.body()), service.model, service.limits)
            deadline = begun + service.limits.request_seconds
            prompt, problem = await until_client_leaves(request, rewritten(service, wanted, deadline))
            revised = prompt if wanted.recaption or wanted.revised_prompt else None
            if wanted.stream:
                response: Response = await stream(service, request, wanted, prompt, revised, deadline)
            else:
                entries = await until_client_leaves(
                    request, images(service, request, wanted, prompt, revised, deadline)
                )
                body = api.images_body(wanted, entries)
                response = JSONResponse({**body, "recaption_problem": problem} if problem else body)
        except Exception as error:
            response = failure(service, error)
        service.metrics.requests.labels(status=response.status_code).inc()
        if response.status_code == 200 and not isinstance(response, StreamingResponse):
            service.metrics.request_seconds.observe(asyncio.get_running_loop().time() - begun)
        return response

    @app.post("/v1/prompts/rewrite")
    async def rewrite(request: Request) -> Response:
        try:
            prompt = parse_prompt(api.read_json(await request.body()), service.limits)
            if service.recaptioner is None:
                raise RequestError("this server has no model that rewrites prompts; use the prompt unchanged")
            seconds = service.limits.request_seconds
            result = await until_client_leaves(request, service.recaptioner.rewrite(prompt, seconds))
            return JSONResponse({"prompt": prompt, "revised_prompt": result.text, "problem": result.problem})
        except Exception as error:
            return failure(service, error)

    @app.get("/v1/models")
    async def models() -> Response:
        return JSONResponse(api.models_body(service.model, service.created))

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != service.model.name:
            return api.error_response(404, f"model {name[:80]!r} does not exist", code="model_not_found")
        return JSONResponse(api.models_body(service.model, service.created)["data"][0])

    @app.get("/health")
    async def health() -> Response:
        ready = service.engine.is_alive and not service.queue.is_draining
        return JSONResponse({"status": "ok" if ready else "ending"}, 200 if ready else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        service.metrics.waiting.set(service.queue.num_waiting)
        service.metrics.active.set(service.queue.num_active)
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/images/{name}.png")
    async def image(name: str) -> Response:
        if name not in service.stored:
            return api.error_response(404, "this image is not kept any more; make it again", code="not_found")
        return Response(
            service.stored[name], media_type="image/png", headers={"cache-control": "private, max-age=3600"}
        )

    @app.get("/lineage")
    async def lineage() -> Response:
        if service.lineage is None or not service.lineage.is_file():
            return api.error_response(404, "the lineage of this model is not known", code="not_found")
        return FileResponse(service.lineage, headers={"content-security-policy": LINEAGE_POLICY})

    @app.get("/")
    async def index() -> Response:
        return FileResponse(PAGE / "index.html", headers={"cache-control": "no-cache"})

    @app.get("/page/{name}")
    async def page_file(name: str) -> Response:
        if name not in PAGE_FILES:
            return api.error_response(404, f"{name[:80]!r} does not exist", code="not_found")
        return FileResponse(PAGE / name, media_type=PAGE_FILES[name], headers={"cache-control": "no-cache"})

    @app.exception_handler(HTTPException)
    async def unknown(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path[:80]}: {error.detail}"
        return api.error_response(error.status_code, message, code="not_found", headers=error.headers)

    return Guard(app, token=token, limits=service.limits)


async def rewritten(service: Service, request: ImageRequest, deadline: float) -> tuple[str, str]:
    """Return the prompt to sample, and the problem if rewriting it was asked for and left it unchanged."""
    if request.revised_prompt:
        return request.revised_prompt, ""
    if not request.recaption or service.recaptioner is None:
        return request.prompt, ""
    result = await service.recaptioner.rewrite(request.prompt, deadline - asyncio.get_running_loop().time())
    return result.text, result.problem


async def images(
    service: Service, http: Request, request: ImageRequest, prompt: str, revised: str | None, deadline: float
) -> list[dict[str, Any]]:
    """Return the entries of all images of a request."""
    entries: dict[int, dict[str, Any]] = {}
    async with contextlib.aclosing(events(service, request, prompt, deadline)) as arriving:
        async for event in arriving:
            if isinstance(event, Finished):
                png = await service.png(request, prompt, event)
                data = (
                    {"url": f"{http.base_url}images/{service.store(png)}.png"}
                    if request.as_url
                    else {"b64_json": api.base64_text(png)}
                )
                entries[event.index] = {
                    **data,
                    **api.image_entry(request, event.index, event.batch_size, revised),
                }
    return [entries[index] for index in range(request.n)]


async def stream(
    service: Service, http: Request, request: ImageRequest, prompt: str, revised: str | None, deadline: float
) -> StreamingResponse:
    """Return a stream of previews and images. Raises the errors of `events` that come before the first event."""
    parts = stream_parts(service, request, prompt, revised, deadline)
    first = await until_client_leaves(http, anext(parts))

    async def content() -> AsyncIterator[bytes]:
        async with contextlib.aclosing(parts):
            yield first
            while True:
                try:
                    part = await until_client_leaves(http, anext(parts, None))
                    if part is None:
                        return
                    yield part
                except ClientLeftError:
                    return
                except Exception as error:
                    response = failure(service, error)
                    yield b"event: error\ndata: " + bytes(response.body) + b"\n\n"
                    return

    return StreamingResponse(content(), media_type="text/event-stream", headers={"cache-control": "no-store"})


async def stream_parts(
    service: Service, request: ImageRequest, prompt: str, revised: str | None, deadline: float
) -> AsyncGenerator[bytes, None]:
    """Yield the server-sent events of a request."""
    async with contextlib.aclosing(events(service, request, prompt, deadline)) as arriving:
        counts = [0] * request.n  # previews of each image
        async for event in arriving:
            fields = {**api.image_settings(request), "created_at": service.created, "image_index": event.index}
            if isinstance(event, Preview):
                await service.check_content(event.image)
                png = await asyncio.to_thread(encode_png, event.image, {})
                more = {"partial_image_index": counts[event.index], "step": event.step}
                counts[event.index] += 1
                yield api.event(api.PARTIAL, {"b64_json": api.base64_text(png), **more, **fields})
            elif isinstance(event, Finished):
                png = await service.png(request, prompt, event)
                entry = api.image_entry(request, event.index, event.batch_size, revised)
                yield api.event(api.COMPLETED, {"b64_json": api.base64_text(png), **entry, **fields})


async def until_client_leaves(http: Request, work: Awaitable[Value]) -> Value:
    """Return the result of `work`, which is cancelled if the client closes the connection.

    Raises ClientLeftError then.
    """
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(http.receive())  # the body has been read: what comes is the end of the connection
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeftError
        return task.result()
    finally:
        for pending in (task, left):
            if not pending.done():
                pending.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await pending


def failure(service: Service, error: Exception) -> JSONResponse:
    """Return the response to an error; one that is not the client's is logged, and its text not sent."""
    match error:
        case RequestError():
            return api.error_response(400, str(error), param=error.param, code=error.code)
        case ContentError():
            return api.error_response(400, str(error), code="content_policy_violation")
        case QueueFullError():
            headers = {"retry-after": str(error.retry_seconds)}
            return api.error_response(429, str(error), code="rate_limit_exceeded", headers=headers)
        case DrainingError():
            return api.error_response(503, "the server is ending", code="ending", headers={"retry-after": "30"})
        case RecaptionError():
            return api.error_response(502, str(error), code="recaption_failed")
        case TimeoutError():
            seconds = service.limits.request_seconds
            return api.error_response(504, f"the images were not ready after {seconds:g} s", code="timeout")
        case ClientLeftError():
            return api.error_response(499, "the client closed the connection", code="client_closed_request")
    logger.error("a request failed", exc_info=error)
    return api.error_response(500, "the server failed; its log has the reason", code="internal_error")
