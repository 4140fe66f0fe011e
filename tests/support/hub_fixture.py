"""A model hub on this machine: an HTTP server with the few endpoints that huggingface_hub downloads by."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "c" * 40
GATED = "owner/gated"  # a model whose licence must be accepted
FILES = {
    "owner/model": {
        "README.md": b"---\nlicense: apache-2.0\n---\n",
        "vae/config.json": b'{"latent_channels": 16}',
        "vae/diffusion_pytorch_model.safetensors": b"weights",
        "unused/weights.bin": b"not fetched",
    }
}


def digest(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """Handler of the requests; `requested` are the paths of the files that were sent."""

    requested: list[str] = []  # noqa: RUF012 - shared by the requests

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, *, body: bool = True) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self.answer_model_info("/".join(parts[2:4]), tree=parts[4:5] == ["tree"])
        elif parts[2:3] == ["resolve"] and (content := FILES.get("/".join(parts[:2]), {}).get("/".join(parts[4:]))):
            if body:
                self.requested.append("/".join(parts[4:]))
            self.send(200, content, body=body)
        else:
            self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body=body)

    def answer_model_info(self, repository: str, *, tree: bool) -> None:
        if repository == GATED:
            self.send(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif repository in FILES and tree:
            files = FILES[repository].items()
            entries = [{"type": "file", "path": name, "size": len(data), "oid": digest(data)} for name, data in files]
            self.send(200, json.dumps(entries).encode())
        elif repository in FILES:
            names = [{"rfilename": name} for name in FILES[repository]]
            self.send(200, json.dumps({"id": repository, "sha": COMMIT, "siblings": names}).encode())
        else:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def send(self, code: int, content: bytes, headers: dict[str, str] | None = None, *, body: bool = True) -> None:
        self.send_response(code)
        values = {"X-Repo-Commit": COMMIT, "ETag": f'"{digest(content)}"'}
        for name, value in {**values, "Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    """Address of a running model hub."""
    Hub.requested.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()
