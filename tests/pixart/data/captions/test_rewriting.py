import json
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from pixart.config.captions import (
    IMAGE_INSTRUCTION,
    REWRITE_INSTRUCTION,
    STYLE,
    CaptionsConfig,
    visible_attributes,
)
from pixart.data.captions import server_requests
from pixart.data.captions.captioner import SEEDS
from pixart.data.captions.rewriting import rewrite, server_generator
from pixart.data.captions.similarity import compare, describe, jensen_shannon_divergence, report

pytestmark = pytest.mark.slow


def test_both_instructions_specify_the_same_style():
    assert STYLE in IMAGE_INSTRUCTION
    assert STYLE in REWRITE_INSTRUCTION


def test_invalid_answers_are_retried_once_and_then_replaced_by_the_request():
    calls = []

    def generate(conversations, sampling):
        requests = [messages[-1]["content"] for messages in conversations]
        (temperature,) = {item["temperature"] for item in sampling}
        (seed,) = {item["seed"] for item in sampling}
        calls.append((requests, temperature, seed))
        answers = {
            "dog": ("A brown dog on a red ball.", False),
            "cat": ("The image shows a cat.", False) if seed == 0 else ("A grey cat. It is on", True),
            "owl": ("I'm sorry, I cannot.", False),
        }
        return [answers[request] for request in requests]

    results = rewrite(["dog", "cat", "owl"], CaptionsConfig(), generate)
    assert [result.text for result in results] == ["A brown dog on a red ball.", "A grey cat.", "owl"]
    assert [result.problem for result in results] == ["", "", "refusal"]
    assert calls == [(["dog", "cat", "owl"], 0.0, 0), (["cat", "owl"], 0.7, 1)]


def test_instruction_and_sampling_are_those_of_the_captions():
    captions, calls = visible_attributes(), []

    def generate(conversations, sampling):
        calls.append((conversations, sampling))
        return [("I'm sorry, I cannot.", False) for _ in conversations]

    rewrite(["dog", "cat"], captions, generate)
    rewrite(["cat"], captions, generate)
    (first, sampled), (_, again), (_, alone), _ = calls
    assert [messages[0]["content"] for messages in first] == [captions.rewrite_instruction] * 2
    assert [messages[1]["content"] for messages in first] == ["dog", "cat"]
    settings = {"temperature": 0.7, "top_p": 0.85, "top_k": 30, "max_tokens": 120}
    assert [{**item, "seed": 0} for item in sampled] == [{**settings, "seed": 0}] * 2
    assert sampled[0]["seed"] != sampled[1]["seed"] == alone[0]["seed"] < SEEDS
    assert [item["seed"] for item in again] == [item["seed"] + 1 for item in sampled]
    assert {item["temperature"] for item in again} == {0.7}


@pytest.mark.parametrize(("temperature", "second"), [(0.0, 0.7), (0.2, 0.7), (0.7, 0.7), (1.2, 1.2)])
def test_the_second_attempt_is_never_colder(temperature, second):
    temperatures = []

    def generate(conversations, sampling):
        temperatures.extend(item["temperature"] for item in sampling)
        return [("", False)]

    rewrite(["dog"], CaptionsConfig(temperature=temperature), generate)
    assert temperatures == [temperature, second]


INVALID_RESPONSES = {
    "an error": {"error": "overloaded"},
    "a list": [],
    "nothing": None,
    "no choice": {"choices": []},
    "no message": {"choices": [{"finish_reason": "stop"}]},
    "no reason": {"choices": [{"message": {"content": "a dog"}}]},
}


class FakeServer(BaseHTTPRequestHandler):
    """A minimal OpenAI-compatible server that logs requests; tests marked vllm use a real vLLM server."""

    log: ClassVar[list[str | None]] = []
    bodies: ClassVar[list[dict]] = []

    def do_GET(self):
        self.answer({"data": [{"id": "some-model"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        request = body["messages"][-1]["content"]
        if request == "bad" or (request == "busy" and self.log.count(request) < 2):
            self.log.append(request)
            self.send_error(500, "out of memory")
            return
        if request == "long":
            self.send_error(400, "longer than the model's context")
            return
        if request == "elsewhere":
            self.send_response(307)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/v1/chat/completions")
            self.end_headers()
            return
        if request == "endless":
            self.answer({"choices": [{"message": {"content": "a" * 5_000_000}, "finish_reason": "stop"}]})
            return
        if request == "no json":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>a red ball</html>")
            return
        if request == "slow header":
            with suppress(OSError):
                self.wfile.write(b"HTTP/1.0 200 OK\r\nX-Header: ")
                for _ in range(1000):
                    self.wfile.write(b"a")
                    self.wfile.flush()
                    time.sleep(0.05)
            return
        if request == "drip":
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                for _ in range(1000):
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(0.05)
            return
        if request in INVALID_RESPONSES:
            self.answer(INVALID_RESPONSES[request])
            return
        self.log.append(self.headers["Authorization"])
        text = f"A {request}, {body['model']}, seed {body['seed']}."
        self.answer({"choices": [{"message": {"content": text}, "finish_reason": "stop"}]})

    def answer(self, value):
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def url(monkeypatch):
    monkeypatch.setattr(server_requests, "BACKOFF_SECONDS", 0.01)
    FakeServer.log.clear()
    FakeServer.bodies.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_server_requests_follow_the_openai_api(url):
    results = rewrite(["red ball", "blue ball"], CaptionsConfig(), server_generator(url))
    assert [result.text for result in results] == [
        "A red ball, some-model, seed 0.",
        "A blue ball, some-model, seed 0.",
    ]
    with pytest.raises(ValueError, match=r"^--server: http://.*/chat/completions answers 500: "):
        rewrite(["bad"], CaptionsConfig(), server_generator(url, "model"))


def test_a_server_gets_the_instruction_and_the_sampling(url):
    rewrite(["red ball"], CaptionsConfig(), server_generator(url))
    rewrite(["red ball"], visible_attributes(), server_generator(url))
    greedy, sampled = FakeServer.bodies
    assert greedy["messages"][0]["content"] == REWRITE_INSTRUCTION
    assert sampled["messages"][0]["content"] == visible_attributes().rewrite_instruction
    names = ("temperature", "top_p", "top_k", "max_tokens")
    assert [greedy.get(name) for name in names] == [0.0, 1.0, None, 120]  # top_k is vLLM's alone
    assert [sampled.get(name) for name in names] == [0.7, 0.85, 30, 120]


@pytest.mark.parametrize("request_", INVALID_RESPONSES)
def test_invalid_response_is_an_error_of_one_line(url, request_):
    with pytest.raises(ValueError, match=r"^--server: http://.* does not follow the OpenAI API; its response has no "):
        rewrite([request_], CaptionsConfig(), server_generator(url))


def test_overloaded_server_is_retried(url):
    assert rewrite(["busy"], CaptionsConfig(), server_generator(url))[0].text == "A busy, some-model, seed 0."
    assert FakeServer.log.count("busy") == 2
    with pytest.raises(ValueError, match="answers 500"):
        rewrite(["bad"], CaptionsConfig(), server_generator(url))
    assert FakeServer.log.count("bad") == server_requests.MAX_ATTEMPTS


def test_rejected_request_is_returned_unchanged(url):
    results = rewrite(["long", "red ball"], CaptionsConfig(), server_generator(url))
    assert [(result.text, result.problem) for result in results] == [
        ("long", "not answered"),
        ("A red ball, some-model, seed 0.", ""),
    ]
    with pytest.raises(ValueError, match=r"answers 400: .*longer than the model's context"):
        rewrite(["long"], CaptionsConfig(), server_generator(url))


def test_api_key_is_sent(url, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    rewrite(["red ball"], CaptionsConfig(), server_generator(url))
    assert FakeServer.log == ["Bearer secret"]


def test_missing_server_is_an_error_of_one_line():
    with pytest.raises(ValueError, match=r"^--server: http://127.0.0.1:9/v1/models does not respond: .*refused"):
        server_generator("http://127.0.0.1:9/v1")


CAPTIONS = [
    "A red ball on green grass. Soft light from the left.",
    "Two brown dogs on a beach. A red ball lies beside them. Evening light.",
]


def test_describe_computes_style_statistics():
    statistics = describe([*CAPTIONS, "The image shows a dog.", "There is a cat. It sits."])
    assert statistics["texts"] == 4
    assert statistics["words"] == 8.5
    assert statistics["sentences"] == 2
    assert statistics["words in the first sentence"] == 5.5
    assert statistics["starts with an article or a number"] == 3 / 4
    assert statistics["starts with a clause such as 'there is'"] == 1 / 4
    assert (statistics["with meta-commentary"], statistics["with a refusal"], statistics["with any problem"]) == (
        1 / 4,
        0,
        1 / 4,
    )
    assert statistics["most common first words"][0] == "a red 25%"
    with pytest.raises(ValueError, match="no texts"):
        describe([])


def test_overlap_and_divergence():
    same = compare(CAPTIONS, CAPTIONS)
    assert same["overlap of common words"] == 1
    assert same["divergence of words, bits"] == 0
    other = compare(CAPTIONS, ["Purple clouds hang low."])
    assert other["overlap of common words"] == 0
    assert other["divergence of words, bits"] == pytest.approx(1)
    assert jensen_shannon_divergence({"a": 1, "b": 1}, {"a": 1}) == pytest.approx(0.3113, abs=1e-4)  # by hand
    assert "| words | 12.50 | 4 |" in report(other)


@pytest.mark.parametrize(
    ("request_text", "message"),
    [
        ("elsewhere", "redirects to another host"),
        ("endless", "longer than 1048576 bytes"),
        ("drip", "not complete after 0.5 s"),
        ("slow header", "not complete after 0.5 s"),
        ("no json", "does not respond: its response: is not JSON; Expecting value"),
    ],
)
def test_a_hostile_server_gets_no_credentials_and_no_time(url, monkeypatch, request_text, message):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setattr(server_requests, "TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(server_requests, "MAX_ATTEMPTS", 1)
    with pytest.raises(ValueError, match=message):
        rewrite([request_text], CaptionsConfig(), server_generator(url, "model"))
    assert FakeServer.log == []  # no further request came with the key
