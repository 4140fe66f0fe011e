"""The HTTP application of the dataset browser, for this machine alone."""

import io
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from jobs.reports.browser.query import FIGURES, PAGE_SIZE, Captions, Search
from jobs.state.audit_files import FOLDER, PAGE
from pixart.html.page import STYLE, text

if TYPE_CHECKING:
    from pixart.data.manifest import Manifest
    from pixart.data.sources.base import Source

HOST = "127.0.0.1"
FILES = Path(__file__).parent / "page"
IMAGE_PIXELS = 640  # longest side
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    "frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Images:
    """The images of a dataset by row: from its source, or the thumbnail stored with a rejected row."""

    def __init__(self, manifest: "Manifest", captions: Captions) -> None:
        self.manifest, self.captions = manifest, captions
        self.lock = threading.Lock()
        self.source: Source | None = None

    def jpeg(self, row: int) -> bytes | None:
        """Return an image as JPEG; None if the dataset has no images, or this one cannot be read."""
        if stored := self.captions.thumbnail(row):
            return stored
        from pixart.data.images.screening import Rejected, decode
        from pixart.data.manifest import open_images

        if self.manifest.adopted:
            return None
        try:
            with self.lock:
                self.source = self.source or open_images(self.manifest)
                item = next(self.source.read(row, row + 1), None)
            if item is None:
                return None
            image = decode(item.data, self.manifest.data.screening)
        except (Rejected, OSError, ValueError):
            return None
        image.thumbnail((IMAGE_PIXELS, IMAGE_PIXELS))
        content = io.BytesIO()
        image.convert("RGB").save(content, "JPEG", quality=88)
        return content.getvalue()


def make_app(manifest: "Manifest") -> FastAPI:
    """Return the application for a dataset. Raises ValueError if it has no captions yet."""
    dataset = Path(manifest.data.path)
    captions = Captions(dataset, manifest.rows_per_shard)
    images, app = Images(manifest, captions), FastAPI(title="Dataset browser", docs_url=None, redoc_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])

    @app.middleware("http")
    async def with_headers(request: Request, call_next: Any) -> Response:
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    @app.exception_handler(ValueError)
    def bad_request(request: Request, error: ValueError) -> JSONResponse:
        return JSONResponse({"error": str(error)}, status_code=400)

    @app.get("/")
    def index() -> HTMLResponse:
        page = (FILES / "index.html").read_text()
        return HTMLResponse(page.replace("{{style}}", STYLE).replace("{{dataset}}", text(str(dataset))))

    @app.get("/page.js")
    def script() -> FileResponse:
        return FileResponse(FILES / "page.js", media_type="text/javascript")

    @app.get("/page.css")
    def style() -> FileResponse:
        return FileResponse(FILES / "page.css", media_type="text/css")

    @app.get("/audit")
    def audit() -> Response:
        page = dataset / FOLDER / PAGE
        return FileResponse(page) if page.exists() else Response("The dataset has not been audited.", 404)

    @app.get("/summary")
    def summary() -> dict[str, Any]:
        return {**captions.summary(), "class_names": manifest.class_names, "figures": list(FIGURES)}

    @app.get("/captions")
    def find(request: Request) -> dict[str, Any]:
        count, rows = captions.find(read_search(request.query_params))
        return {"count": count, "page_size": PAGE_SIZE, "rows": rows}

    @app.get("/image/{row}")
    def image(row: int) -> Response:
        content = images.jpeg(row)
        if content is None:
            return Response(status_code=404)
        return Response(content, media_type="image/jpeg", headers={"Cache-Control": "max-age=3600"})

    return app


def read_search(query: Mapping[str, str]) -> Search:
    """Return the search that a query string asks for. Raises ValueError for text in place of a number."""
    given = {name: value.strip() for name, value in query.items() if value.strip()}

    def number(name: str) -> float | None:
        try:
            return float(given[name]) if name in given else None
        except ValueError:
            raise ValueError(f"{name} {given[name]!r}: must be a number") from None

    limits = {name: (number(f"{name}_min"), number(f"{name}_max")) for name in FIGURES}
    label, shard = number("label"), number("shard")
    return Search(
        words=given.get("words", ""),
        state=given.get("state", ""),
        reason=given.get("reason", ""),
        label=None if label is None else int(label),
        shard=None if shard is None else int(shard),
        limits=limits,
        order=given.get("order", ""),
        page=max(0, int(number("page") or 0)),
    )


def serve(dataset: str, port: int, opened: Callable[[str], None]) -> None:
    """Serve the page of a dataset on this machine until an interrupt; `opened` gets its URL. Port 0 is a free one.

    Raises ValueError if the dataset has no captions yet, or the port is in use.
    """
    import uvicorn

    from pixart.data import manifest as manifests

    app = make_app(manifests.read(dataset))
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError as error:
        raise ValueError(f"--port {port}: {error.strerror}; choose another one") from None
    opened(f"http://{HOST}:{listener.getsockname()[1]}/")
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])
