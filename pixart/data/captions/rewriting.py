"""Prompt rewriting: turn a user's request into a caption in the style of the training captions."""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from pixart.config.captions import CaptionsConfig
from pixart.data.captions.captioner import NUM_ATTEMPTS, attempt_sampling, attempt_seed
from pixart.data.captions.server_requests import RequestRejectedError, send_request
from pixart.data.captions.validation import validate_answer
from pixart.data.captions.vllm_engine import context_length, make_engine

NUM_CONNECTIONS = 16

Conversation = list[dict[str, str]]
Answer = tuple[str, bool]  # the text, and whether it was truncated at max_tokens
Sampling = dict[str, float | int]  # temperature, top_p, top_k, max_tokens and seed of one conversation
Generate = Callable[[list[Conversation], list[Sampling]], list[Answer | None]]
NOT_ANSWERED = "not answered"  # problem of a request that is too long for the model or that the server rejected


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


def server_generator(
    url: str, model: str | None = None, *, seconds: float | None = None, max_attempts: int | None = None
) -> Generate:
    """Return a function that generates answers with an OpenAI-compatible server at `http://host:port/v1`.

    The model defaults to the first one that the server lists. `seconds` and `max_attempts` are those of `send_request`.
    Raises ValueError if the server does not respond or does not follow
    the protocol.
    """
    request_json = functools.partial(send_request, seconds=seconds, max_attempts=max_attempts)

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
