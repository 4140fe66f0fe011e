"""A user's request as a caption of the kind that the model was trained on, by the model that wrote those."""

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from pixart.data.caption_checks import judge
from pixart.data.captioner import MAX_MODEL_LEN, RETRY_TEMPERATURE, REWRITING

MAX_TOKENS = 120
CONNECTIONS = 16
SECONDS = 120  # that a server may take for one answer

Conversation = list[dict[str, str]]
Answer = tuple[str, bool]  # the text, and whether it was cut at MAX_TOKENS
Generate = Callable[[list[Conversation], float, int], list[Answer]]  # conversations, temperature, seed


@dataclass(frozen=True, kw_only=True, slots=True)
class Rewritten:
    request: str
    text: str  # the request itself where no attempt was good
    problem: str  # of the last attempt, "" where it is good


def rewrite(requests: list[str], generate: Generate) -> list[Rewritten]:
    """What is not good at the first attempt is written once more, by another seed."""
    found: dict[int, Rewritten] = {}
    for temperature, seed in ((0.0, 0), (RETRY_TEMPERATURE, 1)):
        left = [at for at in range(len(requests)) if at not in found or found[at].problem]
        answers = generate([conversation(requests[at]) for at in left], temperature, seed) if left else []
        for at, (answer, cut) in zip(left, answers, strict=True):
            text, wrong = judge(answer, cut)
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
    llm = vllm.LLM(
        model=model,
        enforce_eager=not vllm.platforms.current_platform.is_cuda_alike(),
        max_model_len=MAX_MODEL_LEN,
        limit_mm_per_prompt={"image": 0, "video": 0},
    )

    def generate(conversations: list[Conversation], temperature: float, seed: int) -> list[Answer]:
        sampling = vllm.SamplingParams(temperature=temperature, seed=seed, max_tokens=MAX_TOKENS)
        outputs = [output.outputs[0] for output in llm.chat(conversations, sampling, use_tqdm=False)]
        return [(output.text, output.finish_reason == "length") for output in outputs]

    return generate


def server(url: str, model: str | None = None) -> Generate:
    """A server that speaks OpenAI's protocol, such as vLLM's, at `http://host:port/v1`; its first model by default.

    Raises ValueError for one that does not answer as it should.
    """
    name = model or ask(f"{url}/models")["data"][0]["id"]

    def one(messages: Conversation, temperature: float, seed: int) -> Answer:
        body = {"model": name, "messages": messages, "temperature": temperature, "seed": seed, "max_tokens": MAX_TOKENS}
        choice = ask(f"{url}/chat/completions", body)["choices"][0]
        return choice["message"]["content"] or "", choice["finish_reason"] == "length"

    def generate(conversations: list[Conversation], temperature: float, seed: int) -> list[Answer]:
        with ThreadPoolExecutor(CONNECTIONS) as threads:
            return list(threads.map(lambda each: one(each, temperature, seed), conversations))

    return generate


def ask(url: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    try:
        asked = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(asked, timeout=SECONDS) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        told = " ".join(error.read(300).decode(errors="replace").split())
        raise ValueError(f"--server: {url} answers {error.code}: {told}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"--server: {url} does not answer: {getattr(error, 'reason', error)}") from None
