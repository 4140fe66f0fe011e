"""Rewriting of prompts through the server, by a good and by a hostile server."""

import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

from pixart.config.captions import CaptionsConfig
from pixart.serving.recaptioning import NUM_THREADS, by_server
from tests.pixart.data.captions.test_rewriting import FakeServer, url  # noqa: F401 - a fixture
from tests.pixart.serving.test_openai_api import client, opened
from tests.pixart.serving.test_robustness import PROMPT, post
from tests.support.serving_fixture import RunningServer

SECONDS = 0.5  # of a request to the server that rewrites
HOSTILE = ("elsewhere", "endless", "drip", "slow header", "no json", "no message", "bad")


@pytest.fixture
def server(serve, url) -> RunningServer:  # noqa: F811 - the fixture
    return serve(recaptioner=by_server(CaptionsConfig(), url, "model", seconds=SECONDS))


def test_a_rewritten_prompt_is_sampled_and_returned(server):
    (image,) = client(server).images.generate(prompt="red ball", extra_body={"recaption": True, "steps": 1}).data
    assert image.prompt == "red ball"
    assert image.revised_prompt.startswith("A red ball, model")
    assert opened(image).text["prompt"] == image.revised_prompt
    assert opened(image).text["request"] == "red ball"


def test_a_hostile_server_is_bounded(server, monkeypatch):
    """Each answer is a 502 soon; other requests are served meanwhile, and the credentials go nowhere else."""
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    requests = [text for text in HOSTILE for _ in range(2)]
    assert len(requests) > NUM_THREADS
    begun = time.monotonic()
    with ThreadPoolExecutor(len(requests)) as threads:
        bodies = [{"prompt": text, "recaption": True} for text in requests]
        refused = [threads.submit(post, server.url, json=body) for body in bodies]
        assert post(server.url, json={**PROMPT, "steps": 1}).status_code == 200
        answers = [task.result() for task in refused]
    assert time.monotonic() - begun < 30
    assert {answer.status_code for answer in answers} == {502}
    assert {answer.json()["error"]["code"] for answer in answers} == {"recaption_failed"}
    assert all("secret" not in answer.text for answer in answers)
    assert "Bearer secret" not in FakeServer.log
    with pytest.raises(openai.InternalServerError, match="failed; see the server's log"):
        client(server).images.generate(prompt="no json", extra_body={"recaption": True})
    (image,) = client(server).images.generate(prompt="red ball", extra_body={"recaption": True, "steps": 1}).data
    assert image.revised_prompt
