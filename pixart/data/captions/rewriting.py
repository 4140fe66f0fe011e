"""Prompt rewriting: turn a user's request into a caption in the style of the training captions."""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import Any
from urllib.parse import urlsplit

from pixart.config.captions import CaptionsConfig
from pixart.data.captions.captioner import NUM_ATTEMPTS, attempt_sampling, attempt_seed
from pixart.data.captions.validation import validate_answer
from pixart.data.captions.vllm_engine import context_length, make_engine

NUM_CONNECTIONS = 16
TIMEOUT_SECONDS = 120  # per request to a server
MAX_RESPONSE_BYTES = 1 << 20  # many times a rewritten request

Conversation = list[dict[str, str]]
Answer = tuple[str, bool]  # the text, and whether it was truncated at max_tokens
Sampling = dict[str, float | int]  # temperature, top_p, top_k, max_tokens and seed of one conversation
Generate = Callable[[list[Conversation], list[Sampling]], list[Answer | None]]
NOT_ANSWERED = "not answered"  # problem of a request that is too long for the model or that the server rejected
MAX_ATTEMPTS = 4  # per request to a server
BACKOFF_SECONDS = 0.5  # before the second attempt, doubled before each further one
RETRY_STATUSES = (429, 500, 502, 503, 504)
REJECTED_STATUSES = (400, 413, 422)  # the server rejects this request only


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewritten:
    """A rewritten request."""

    request: str
    text: str  # the unchanged request if no attempt was valid
    problem: str  # of the last attempt, or NOT_ANSWERED; "" if the text is valid


def rewrite(requests: list[str], captions: CaptionsConfig, generate: Generate) -> list[Rewritten]:
    """Rewrite requests by the instruction and sampling of a dataset's captions.

    An invalid answer is attempted once more with another seed, and a temperature that is not lower.
    """
    results: dict[int, Rewritten] = {}
    for attempt in range(NUM_ATTEMPTS):
        remaining = [index for index in range(len(requests)) if index not in results or results[index].problem]
        conversations = [conversation(captions.rewrite_instruction, requests[index]) for index in remaining]
        sampling = [request_sampling(captions, requests[index], attempt) for index in remaining]
        answers = generate(conversations, sampling) if remaining else []
        for index, answer in zip(remaining, answers, strict=True):
            request = requests[index]
            text, problem = validate_answer(answer[0], truncated=answer[1]) if answer else ("", NOT_ANSWERED)
            results[index] = Rewritten(request=request, text=request if problem else text, problem=problem or "")
    return [results[index] for index in range(len(requests))]


def request_sampling(captions: CaptionsConfig, request: str, attempt: int) -> Sampling:
    """Return the sampling of an attempt for a request, with a seed that depends on the request alone."""
    seed = attempt_seed(captions, sha256(request.encode()).digest(), attempt)
    return {**attempt_sampling(captions, attempt), "seed": seed}


def conversation(instruction: str, request: str) -> Conversation:
    """Return the chat messages that ask for one rewritten request."""
    return [{"role": "system", "content": instruction}, {"role": "user", "content": request}]


def vllm_generator(model: str, captions: CaptionsConfig) -> Generate:
    """Return a function that generates answers with a vLLM engine in this process.

    Raises ValueError if vLLM is not installed.
    """
    try:
        import vllm
    except ModuleNotFoundError as error:
        raise ValueError(f"recaption: {error}; install vllm, or name a --server") from None
    length = context_length(captions.rewrite_instruction, captions.max_tokens)
    llm = make_engine(model, max_model_len=length, limit_mm_per_prompt={"image": 0, "video": 0})
    tokenizer: Any = llm.get_tokenizer()

    def fits_context(messages: Conversation) -> bool:
        """Return whether a conversation fits into the model's context; vLLM would fail the batch if one did not."""
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"]) + captions.max_tokens <= length

    def generate(conversations: list[Conversation], sampling: list[Sampling]) -> list[Answer | None]:
        answers: list[Answer | None] = [None] * len(conversations)
        fitting = [index for index, messages in enumerate(conversations) if fits_context(messages)]
        parameters = [vllm.SamplingParams(**sampling[index]) for index in fitting]
        outputs = llm.chat([conversations[index] for index in fitting], parameters, use_tqdm=False) if fitting else []
        for index, output in zip(fitting, outputs, strict=True):
            answers[index] = output.outputs[0].text, output.outputs[0].finish_reason == "length"
        return answers

    return generate


def server_generator(url: str, model: str | None = None) -> Generate:
    """Return a function that generates answers with an OpenAI-compatible server at `http://host:port/v1`.

    The model defaults to the first one that the server lists. Raises ValueError if the server does not respond or
    does not follow the protocol.
    """

    def get_field(response: Any, *keys: str | int) -> Any:
        try:
            for key in keys:
                response = response[key]
        except (LookupError, TypeError):
            raise ValueError(f"--server: {url} does not follow the OpenAI API; its response has no {keys[0]}") from None
        return response

    name = model or get_field(request_json(f"{url}/models"), "data", 0, "id")

    def complete(messages: Conversation, sampling: Sampling) -> Answer | ValueError:
        # Servers other than vLLM's may refuse `top_k`, which is no parameter of OpenAI's.
        parameters = {key: value for key, value in sampling.items() if key != "top_k" or value}
        body = {"model": name, "messages": messages, **parameters}
        try:
            response = request_json(f"{url}/chat/completions", body)
        except RequestRejectedError as error:
            return error
        text, reason = (
            get_field(response, "choices", 0, *keys) for keys in (["message", "content"], ["finish_reason"])
        )
        return str(text or ""), reason == "length"

    answered = False  # whether the server has answered any request

    def generate(conversations: list[Conversation], sampling: list[Sampling]) -> list[Answer | None]:
        nonlocal answered
        with ThreadPoolExecutor(NUM_CONNECTIONS) as threads:
            answers = list(threads.map(complete, conversations, sampling))
        rejections = [answer for answer in answers if isinstance(answer, ValueError)]
        answered = answered or len(rejections) < len(answers)
        if not answered:  # the problem is not an individual request
            raise rejections[0]
        return [None if isinstance(answer, ValueError) else answer for answer in answers]

    return generate


class RequestRejectedError(ValueError):
    """The server rejects this request, and would reject it again."""


class SameHostRedirects(urllib.request.HTTPRedirectHandler):
    """Follow redirects on the same host only: another one would receive the request and its credentials."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlsplit(newurl).netloc != urlsplit(req.full_url).netloc:
            raise urllib.error.URLError(f"it redirects to another host, {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


OPENER = urllib.request.build_opener(SameHostRedirects)


def read_limited(response: Any, deadline: float) -> bytes:
    """Return the content of a response. Raises ValueError if it is too long, TimeoutError if it comes too slowly."""
    content = b""
    while part := response.read1(MAX_RESPONSE_BYTES):
        content += part
        if len(content) > MAX_RESPONSE_BYTES:
            raise ValueError(f"its response is longer than {MAX_RESPONSE_BYTES} bytes")
        if time.monotonic() > deadline:
            raise TimeoutError(f"its response is not complete after {TIMEOUT_SECONDS} s")
    return content


def request_json(url: str, body: dict | None = None) -> dict:
    """Return the JSON response to a GET request, or to a POST request with `body`; retry if the server is overloaded.

    Raises RequestRejectedError if the server rejects the request itself, and ValueError for every other failure.
    """
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    for attempt in range(MAX_ATTEMPTS):
        try:
            with OPENER.open(urllib.request.Request(url, data, headers), timeout=TIMEOUT_SECONDS) as response:
                return json.loads(read_limited(response, time.monotonic() + TIMEOUT_SECONDS))
        except urllib.error.HTTPError as error:
            message = " ".join(error.read(300).decode(errors="replace").split())
            kind = RequestRejectedError if error.code in REJECTED_STATUSES else ValueError
            failure, retry = kind(f"--server: {url} answers {error.code}: {message}"), error.code in RETRY_STATUSES
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            retry = isinstance(reason, ConnectionResetError | TimeoutError | http.client.HTTPException)
            failure = ValueError(f"--server: {url} does not respond: {reason}")
        if not retry:
            break
        if attempt + 1 < MAX_ATTEMPTS:
            time.sleep(BACKOFF_SECONDS * 2**attempt)
    raise failure from None
