import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from pixart.data.captions import rewriting
from pixart.data.captions.captioner import INSTRUCTION, REWRITING, STYLE
from pixart.data.captions.rewriting import rewrite, server
from pixart.data.captions.similarity import compare, describe, divergence, report


def test_both_instructions_ask_for_one_style():
    assert STYLE in INSTRUCTION
    assert STYLE in REWRITING


def test_what_is_bad_is_asked_again_and_left_alone_if_it_stays_so():
    asked = []

    def generate(conversations, temperature, seed):
        requests = [messages[-1]["content"] for messages in conversations]
        asked.append((requests, temperature, seed))
        told = {
            "dog": ("A brown dog on a red ball.", False),
            "cat": ("The image shows a cat.", False) if seed == 0 else ("A grey cat. It is on", True),
            "owl": ("I'm sorry, I cannot.", False),
        }
        return [told[request] for request in requests]

    found = rewrite(["dog", "cat", "owl"], generate)
    assert [each.text for each in found] == ["A brown dog on a red ball.", "A grey cat.", "owl"]
    assert [each.problem for each in found] == ["", "", "refusal"]
    assert asked == [(["dog", "cat", "owl"], 0.0, 0), (["cat", "owl"], 0.7, 1)]


RUBBISH = {
    "an error": {"error": "overloaded"},
    "a list": [],
    "nothing": None,
    "no choice": {"choices": []},
    "no message": {"choices": [{"finish_reason": "stop"}]},
    "no reason": {"choices": [{"message": {"content": "a dog"}}]},
}


class Answers(BaseHTTPRequestHandler):
    """Speaks just what `recaption` asks, to look at what it sends; a real vLLM server is in the tests marked vllm."""

    log: ClassVar[list[str | None]] = []

    def do_GET(self):
        self.answer({"data": [{"id": "some-model"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request = body["messages"][-1]["content"]
        if request == "bad" or (request == "busy" and self.log.count(request) < 2):
            self.log.append(request)
            self.send_error(500, "out of memory")
            return
        if request == "long":
            self.send_error(400, "longer than the model's context")
            return
        if request in RUBBISH:
            self.answer(RUBBISH[request])
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
    monkeypatch.setattr(rewriting, "PAUSE", 0.01)
    Answers.log.clear()
    listening = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}/v1"
    listening.shutdown()


def test_a_server_is_asked_by_openais_protocol(url):
    found = rewrite(["red ball", "blue ball"], server(url))
    assert [each.text for each in found] == ["A red ball, some-model, seed 0.", "A blue ball, some-model, seed 0."]
    with pytest.raises(ValueError, match=r"^--server: http://.*/chat/completions answers 500: "):
        rewrite(["bad"], server(url, "model"))


@pytest.mark.parametrize("request_", RUBBISH)
def test_a_server_that_answers_rubbish_is_one_line(url, request_):
    with pytest.raises(ValueError, match=r"^--server: http://.* answers otherwise than OpenAI's protocol has it"):
        rewrite([request_], server(url))


def test_a_busy_server_is_asked_again(url):
    assert rewrite(["busy"], server(url))[0].text == "A busy, some-model, seed 0."
    assert Answers.log.count("busy") == 2
    with pytest.raises(ValueError, match="answers 500"):
        rewrite(["bad"], server(url))
    assert Answers.log.count("bad") == rewriting.TRIES


def test_a_request_that_a_server_refuses_comes_back_as_it_is(url):
    found = rewrite(["long", "red ball"], server(url))
    assert [(each.text, each.problem) for each in found] == [
        ("long", "not answered"),
        ("A red ball, some-model, seed 0.", ""),
    ]
    with pytest.raises(ValueError, match=r"answers 400: .*longer than the model's context"):
        rewrite(["long"], server(url))


def test_a_server_with_a_key(url, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    rewrite(["red ball"], server(url))
    assert Answers.log == ["Bearer secret"]


def test_a_server_that_is_not_there_is_one_line():
    with pytest.raises(ValueError, match=r"^--server: http://127.0.0.1:9/v1/models does not answer: .*refused"):
        server("http://127.0.0.1:9/v1")


CAPTIONS = [
    "A red ball on green grass. Soft light from the left.",
    "Two brown dogs on a beach. A red ball lies beside them. Evening light.",
]


def test_figures_of_a_style():
    found = describe([*CAPTIONS, "The image shows a dog.", "There is a cat. It sits."])
    assert found["texts"] == 4
    assert found["words"] == 8.5
    assert found["sentences"] == 2
    assert found["words of the first sentence"] == 5.5
    assert found["opening with an article or a number"] == 3 / 4
    assert found["opening with a verb, as in 'there is'"] == 1 / 4
    assert (found["with narration"], found["with refusal"], found["with any problem"]) == (1 / 4, 0, 1 / 4)
    assert found["commonest openings"][0] == "a red 25%"
    with pytest.raises(ValueError, match="no texts"):
        describe([])


def test_overlap_and_divergence():
    same = compare(CAPTIONS, CAPTIONS)
    assert same["overlap of common words"] == 1
    assert same["divergence of words, bits"] == 0
    other = compare(CAPTIONS, ["Purple clouds hang low."])
    assert other["overlap of common words"] == 0
    assert other["divergence of words, bits"] == pytest.approx(1)
    assert divergence({"a": 1, "b": 1}, {"a": 1}) == pytest.approx(0.3113, abs=1e-4)  # by hand
    assert "| words | 12.50 | 4 |" in report(other)
