"""A user's request as a caption of the kind that the model was trained on, by the model that wrote those."""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pixart.data.captions.captioner import RETRY_TEMPERATURE, REWRITING
from pixart.data.captions.validation import judge
from pixart.data.captions.vllm_engine import MAX_MODEL_LEN, make_engine

MAX_TOKENS = 120
FIRST_SEED = 0
CONNECTIONS = 16
SECONDS = 120  # that a server may take for one answer

Conversation = list[dict[str, str]]
Answer = tuple[str, bool]  # the text, and whether it was cut at MAX_TOKENS
Generate = Callable[[list[Conversation], float, int], list[Answer | None]]  # conversations, temperature, seed
NOT_ANSWERED = "not answered"  # by the model: too long, or refused by the server
TRIES = 4  # of a request that a server is too busy for
PAUSE = 0.5  # seconds after the first try, twice as many after each other
BUSY = (429, 500, 502, 503, 504)
REFUSED = (400, 413, 422)  # this request, not all


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewritten:
    request: str
    text: str  # the request itself where no attempt was good
    problem: str  # of the last attempt, or NOT_ANSWERED; "" where it is good


def rewrite(requests: list[str], generate: Generate) -> list[Rewritten]:
    """What is not good at the first attempt is written once more, by another seed."""
    found: dict[int, Rewritten] = {}
    for temperature, seed in ((0.0, FIRST_SEED), (RETRY_TEMPERATURE, FIRST_SEED + 1)):
        left = [at for at in range(len(requests)) if at not in found or found[at].problem]
        answers = generate([conversation(requests[at]) for at in left], temperature, seed) if left else []
        for at, answer in zip(left, answers, strict=True):
            text, wrong = judge(*answer) if answer else ("", NOT_ANSWERED)
            found[at] = Rewritten(request=requests[at], text=requests[at] if wrong else text, problem=wrong or "")
    return [found[at] for at in range(len(requests))]


def conversation(request: str) -> Conversation:
    return [{"role": "system", "content": REWRITING}, {"role": "user", "content": request}]


def engine(model: str) -> Generate:
    """vLLM in this process. Raises ValueError where it is not installed."""
    try:
        import vllm
    except ModuleNotFoundError as error:
        raise ValueError(f"recaption: {error}; install vllm, or name a --server") from None
    llm = make_engine(model, limit_mm_per_prompt={"image": 0, "video": 0})
    tokenizer: Any = llm.get_tokenizer()

    def fits(messages: Conversation) -> bool:
        """One that does not would end the call for all."""
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return len(tokenizer(text, add_special_tokens=False)["input_ids"]) + MAX_TOKENS <= MAX_MODEL_LEN

    def generate(conversations: list[Conversation], temperature: float, seed: int) -> list[Answer | None]:
        sampling = vllm.SamplingParams(temperature=temperature, seed=seed, max_tokens=MAX_TOKENS)
        answers: list[Answer | None] = [None] * len(conversations)
        fitting = [at for at, messages in enumerate(conversations) if fits(messages)]
        outputs = llm.chat([conversations[at] for at in fitting], sampling, use_tqdm=False) if fitting else []
        for at, output in zip(fitting, outputs, strict=True):
            answers[at] = output.outputs[0].text, output.outputs[0].finish_reason == "length"
        return answers

    return generate


def server(url: str, model: str | None = None) -> Generate:
    """A server that speaks OpenAI's protocol, such as vLLM's, at `http://host:port/v1`; its first model by default.

    Raises ValueError for one that does not answer as it should.
    """

    def told(answer: Any, *keys: str | int) -> Any:
        try:
            for key in keys:
                answer = answer[key]
        except (LookupError, TypeError):
            raise ValueError(f"--server: {url} answers otherwise than OpenAI's protocol has it: no {keys[0]}") from None
        return answer

    name = model or told(ask(f"{url}/models"), "data", 0, "id")

    def one(messages: Conversation, temperature: float, seed: int) -> Answer | ValueError:
        body = {"model": name, "messages": messages, "temperature": temperature, "seed": seed, "max_tokens": MAX_TOKENS}
        try:
            answer = ask(f"{url}/chat/completions", body)
        except RefusedError as error:
            return error
        text, reason = (told(answer, "choices", 0, *keys) for keys in (["message", "content"], ["finish_reason"]))
        return str(text or ""), reason == "length"

    def generate(conversations: list[Conversation], temperature: float, seed: int) -> list[Answer | None]:
        with ThreadPoolExecutor(CONNECTIONS) as threads:
            answers = list(threads.map(lambda each: one(each, temperature, seed), conversations))
        refused = [answer for answer in answers if isinstance(answer, ValueError)]
        if seed == FIRST_SEED and len(refused) == len(answers):  # not this or that request, but all that we ask
            raise refused[0]
        return [None if isinstance(answer, ValueError) else answer for answer in answers]

    return generate


class RefusedError(ValueError):
    """The server does not take this request, whenever it is asked."""


def ask(url: str, body: dict | None = None) -> dict:
    """The server's answer as JSON; asked again where it is too busy. Raises ValueError, RefusedError among them."""
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    for attempt in range(TRIES):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            told = " ".join(error.read(300).decode(errors="replace").split())
            kind = RefusedError if error.code in REFUSED else ValueError
            failure, again = kind(f"--server: {url} answers {error.code}: {told}"), error.code in BUSY
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            again = isinstance(reason, ConnectionResetError | TimeoutError | http.client.HTTPException)
            failure = ValueError(f"--server: {url} does not answer: {reason}")
        if not again:
            break
        if attempt + 1 < TRIES:
            time.sleep(PAUSE * 2**attempt)
    raise failure from None
