"""A model hub on this machine: an HTTP server with the few endpoints that huggingface_hub downloads and uploads by."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "c" * 40
TOKEN = "hf_secret"  # that may upload
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
    """Handler of the requests; `requested` are the paths of the files that were sent.

    `created` are the repositories that were asked for, and `uploaded` the files of commits by path.
    """

    requested: list[str] = []  # noqa: RUF012 - shared by the requests
    created: list[dict[str, object]] = []  # noqa: RUF012
    uploaded: dict[str, bytes] = {}  # noqa: RUF012

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

    def do_POST(self) -> None:
        """Create a repository, say that all files are sent within the commit, and keep the files of a commit."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        path = urlsplit(self.path).path
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.send(401, b"{}")
        elif path == "/api/repos/create":
            self.created.append(json.loads(content))
            self.send(200, json.dumps({"url": f"http://{self.headers['Host']}/owner/new"}).encode())
        elif path == "/api/validate-yaml":
            self.send(200, b'{"errors": [], "warnings": []}')
        elif path.endswith("/preupload/main"):
            names = [file["path"] for file in json.loads(content)["files"]]
            entries = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.send(200, json.dumps({"files": entries}).encode())
        elif path.endswith("/commit/main"):
            for line in map(json.loads, content.splitlines()):
                if line["key"] == "file":
                    self.uploaded[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"http://{self.headers['Host']}/owner/new/commit/{COMMIT}"
            self.send(200, json.dumps({"commitOid": COMMIT, "commitUrl": url, "hookOutput": ""}).encode())
        else:
            self.send(404, b"{}")

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
    for kept in (Hub.requested, Hub.created, Hub.uploaded):
        kept.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()
