"""Hostile answers of a rewriting server, and hostile requests to the suite's own server."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pixart.config.captions import CaptionsConfig
from pixart.data.captions.rewriting import rewrite
from pixart.data.captions.server_requests import send_request
from pixart.data.captions.validation import validate_answer
from pixart.serving.openai_api import read_json
from pixart.serving.requests import Limits, ServedModel, parse_images, parse_prompt
from tests.attack.campaign import campaign
from tests.attack.hostile import TEXTS, VALUES, damages, dumped, places, replaced

ANSWER = {"choices": [{"message": {"content": "a red circle"}, "finish_reason": "stop"}], "data": [{"id": "model"}]}
STATUSES = (200, 204, 206, 301, 302, 307, 400, 401, 404, 413, 429, 500, 503, 999)
REQUEST = {"prompt": "a dog", "n": 1, "seed": 3, "size": "64x64", "steps": 4, "guidance": 2.0, "stream": False}
MODEL = ServedModel(name="model", stage=2, size=(64, 64), steps=4, guidance=2.0, weights=("ema",))
SECRET = "attack-secret"


class Handler(BaseHTTPRequestHandler):
    """Answers as the test says: a status, headers and a body."""

    answer: tuple[int, dict[str, str], bytes]
    keys: list[str]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        status, headers, body = self.answer
        with suppress(OSError, UnicodeEncodeError):
            self.send_response(status)
            for name, value in {"content-length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    def do_GET(self) -> None:  # of a redirect
        self.keys.append(self.headers.get("authorization", ""))
        self.do_POST()

    def log_message(self, *words: Any) -> None:
        """Log nothing."""


@contextmanager
def serving() -> Iterator[tuple[type[Handler], str]]:
    """Run a server of hostile answers, and yield its handler and its URL."""
    handler = type("Answering", (Handler,), {"answer": (200, {}, b"{}"), "keys": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield handler, f"http://127.0.0.1:{server.server_port}/v1/chat/completions"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_hostile_answers_of_a_server_are_refused(record_property, monkeypatch):
    """An answer is a JSON object or an error of one line; no other host receives the key."""
    attack = campaign("answers of servers", short=150, long=1500)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    made = damages(dumped(ANSWER), attack.generator)
    with serving() as (handler, url), serving() as (other, elsewhere):
        for number in range(attack.tries):
            name, damage = made[number % len(made)]
            status = attack.generator.choice(STATUSES) if number % 3 == 0 else 200
            target = attack.generator.choice([elsewhere, url, "file:///etc/passwd", "ftp://a", "\x1b", "//"])
            headers = {"location": target} if 300 <= status < 400 else {}
            if number % 7 == 0:
                headers["content-length"] = attack.generator.choice(["9" * 30, "-1", "x", "5"])
            handler.answer = (status, headers, damage())
            answer = attack.attempt(
                f"{status} {name}",
                lambda: send_request(url, {"a": 1}, seconds=2, max_attempts=1),
            )
            if answer is not None and not isinstance(answer, dict):
                attack.wrong(name, f"the answer is {answer!r}")
        if other.keys:
            attack.wrong("redirect", f"another host was asked, with {other.keys[0]!r}")
    attack.finish(record_property)


def test_hostile_texts_of_a_model_are_no_captions(record_property):
    """The answer of a model is one printable line, or the request is kept unchanged."""
    attack = campaign("answers of models", short=200, long=len(TEXTS) * 8)
    for number in range(attack.tries):
        text = TEXTS[number % len(TEXTS)] * attack.generator.choice([1, 3, 500])
        name = repr(text[:60])
        result = attack.attempt(
            name, lambda text=text: rewrite(["a dog"], CaptionsConfig(), lambda *_: [(text, False)])
        )
        if result and not result[0].problem and not result[0].text.isprintable():
            attack.wrong(name, f"an accepted text has control characters: {result[0].text[:80]!r}")
        attack.attempt(name, lambda text=text: validate_answer(text, truncated=False))
    attack.finish(record_property)


def test_hostile_requests_to_the_server_are_refused(record_property):
    """A body is a request within the limits, or is refused with a reason."""
    attack = campaign("requests to the server", short=600, long=4000)
    bodies = [dumped(replaced(REQUEST, path, value)) for path in places(REQUEST) for value in VALUES]
    bodies += [dumped({**REQUEST, key: text}) for key in REQUEST for text in TEXTS]
    bodies += [damage() for _, damage in damages(dumped(REQUEST), attack.generator)]
    attack.generator.shuffle(bodies)
    limits = Limits()
    for body in bodies[: attack.tries]:
        name = repr(body[:80])
        wanted = attack.attempt(name, lambda body=body: parse_images(read_json(body), MODEL, limits))
        if wanted and not (1 <= wanted.n <= limits.images and 1 <= wanted.steps <= limits.steps):
            attack.wrong(name, f"it is accepted as {wanted}")
        if wanted and len(wanted.prompt) > limits.prompt_characters:
            attack.wrong(name, "a prompt beyond the limit is accepted")
        attack.attempt(name, lambda body=body: parse_prompt(read_json(body), limits))
    assert json.loads(dumped(REQUEST)) == REQUEST
    attack.finish(record_property)
