"""Requests for images: their limits, and the check of what a client sends.

The fields are those of OpenAI's images API, and revised_prompt, steps, guidance, seed, recaption and weights.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_SEED = 2**63 - 1
RANDOM_SEED_BITS = 32  # of a seed that the client does not choose; JavaScript represents it exactly
MAX_GUIDANCE = 100.0
AUTO = "auto"


class RequestError(ValueError):
    """A request that is refused; `param` is the field at fault, `code` OpenAI's name of the error."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param, self.code = param, code


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Limits of a server and of each request."""

    prompt_characters: int = 4000
    images: int = 8  # of one request, `n`
    steps: int = 100
    body_bytes: int = 64 * 1024
    body_seconds: float = 10.0  # until the body of a request has arrived
    queued_images: int = 64  # that wait; a request beyond is answered by 429
    batch_size: int = 16  # images that are denoised at once
    request_seconds: float = 300.0  # until a request is answered by 504
    stored_images: int = 256  # that are kept for `response_format=url`


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """The model as clients see it: its name, stage, image size and defaults."""

    name: str
    stage: int
    size: tuple[int, int]  # width and height in pixels of the images that it was trained on
    steps: int
    guidance: float
    weights: tuple[str, ...]  # that a request may choose; the first is the default
    classes: tuple[str, ...] = ()  # names of the classes, in stage 1
    num_classes: int | None = None  # with the null class, in stage 1
    recaption: bool = False  # whether requests can be rewritten


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRequest:
    """A checked request for images; image k has the seed `seed` + k."""

    prompt: str  # in stage 1 the name or index of a class, or `none`
    revised_prompt: str | None = None  # that is sampled in place of the prompt, which the client rewrote or edited
    n: int
    seed: int
    steps: int
    guidance: float
    size: tuple[int, int]  # width and height in pixels
    weights: str
    recaption: bool = False
    as_url: bool = False
    stream: bool = False
    partial_images: int = 0  # previews per image, in a stream


class ImageBody(BaseModel):
    """The JSON body of a request for images. Fields of OpenAI's API with one possible value accept that value only."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: Annotated[str, Field(min_length=1)]
    revised_prompt: Annotated[str, Field(min_length=1)] | None = None
    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0)] | None = None
    output_format: Literal["png"] | None = None
    quality: Literal["auto"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto"] | None = None
    user: Annotated[str, Field(max_length=256)] | None = None
    safety_identifier: Annotated[str, Field(max_length=256)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    guidance: Annotated[float, Field(ge=0, le=MAX_GUIDANCE, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] | None = None
    recaption: bool | None = None
    weights: str | None = None


class PromptBody(BaseModel):
    """The JSON body of a request to rewrite a prompt."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: Annotated[str, Field(min_length=1)]


def parse_images(content: Any, model: ServedModel, limits: Limits) -> ImageRequest:
    """Return the request that a JSON body holds, with the model's defaults. Raises RequestError naming the field."""
    body = validate(ImageBody, content)
    check_prompt(body.prompt, limits)
    if body.model not in (None, model.name):
        raise RequestError(
            f"model={body.model!r}: is not served; it must be {model.name!r}", param="model", code="model_not_found"
        )
    at_most = {"n": limits.images, "steps": limits.steps, "partial_images": limits.steps}
    for name, limit in at_most.items():
        value = getattr(body, name)
        if value is not None and value > limit:
            raise RequestError(f"{name}={value}: is above the limit; it must be at most {limit}", param=name)
    weights = body.weights or model.weights[0]
    if weights not in model.weights:
        raise RequestError(
            f"weights={weights!r}: are not served; they must be one of {', '.join(model.weights)}", param="weights"
        )
    if body.recaption and not model.recaption:
        raise RequestError("recaption: this server has no model that rewrites prompts; leave it out", param="recaption")
    if body.partial_images and not body.stream:
        raise RequestError("partial_images: are sent in a stream only; set stream to true", param="partial_images")
    if body.stream and body.response_format == "url":
        raise RequestError("response_format='url': a stream has b64_json only", param="response_format")
    if body.revised_prompt is not None:
        if body.recaption or model.stage == 1:
            reason = "recaption writes it" if body.recaption else "a class has no prompt"
            raise RequestError(f"revised_prompt: cannot be given, as {reason}; leave it out", param="revised_prompt")
        check_prompt(body.revised_prompt, limits, param="revised_prompt")
    if model.stage == 1:
        check_class(body.prompt, model)
    n = body.n or 1
    seed = secrets.randbits(RANDOM_SEED_BITS) if body.seed is None else body.seed
    if seed > MAX_SEED - n:
        raise RequestError(f"seed={seed}: must be at most {MAX_SEED - n} for {n} images", param="seed")
    return ImageRequest(
        prompt=body.prompt,
        revised_prompt=body.revised_prompt,
        n=n,
        seed=seed,
        steps=body.steps or model.steps,
        guidance=model.guidance if body.guidance is None else body.guidance,
        size=parse_size(body.size, model),
        weights=weights,
        recaption=bool(body.recaption),
        as_url=body.response_format == "url",
        stream=bool(body.stream),
        partial_images=body.partial_images or 0,
    )


def parse_prompt(content: Any, limits: Limits) -> str:
    """Return the prompt of a request to rewrite it. Raises RequestError naming the field."""
    prompt = validate(PromptBody, content).prompt
    check_prompt(prompt, limits)
    return prompt


def parse_size(size: str | None, model: ServedModel) -> tuple[int, int]:
    """Return the width and height in pixels that a request asks for: those that the model was trained on, or `auto`.

    Raises RequestError for any other size.
    """
    width, height = model.size
    if size not in (None, AUTO, f"{width}x{height}"):
        raise RequestError(f"size={size!r}: is not served; it must be {width}x{height} or {AUTO}", param="size")
    return model.size


def check_prompt(prompt: str, limits: Limits, param: str = "prompt") -> None:
    """Raise RequestError for a prompt that is empty, too long, or has characters that no text file can hold."""
    if len(prompt) > limits.prompt_characters:
        raise RequestError(
            f"{param}: has {len(prompt)} characters; it must have at most {limits.prompt_characters}",
            param=param,
            code="string_above_max_length",
        )
    if not prompt.strip():
        raise RequestError(f"{param}: is empty; describe the image", param=param)
    if any(0xD800 <= ord(letter) < 0xE000 or (letter < " " and letter not in "\t\n\r") for letter in prompt):
        raise RequestError(f"{param}: has control characters or lone surrogates; remove them", param=param)


def check_class(name: str, model: ServedModel) -> None:
    """Raise RequestError unless the model has a class of this name or index."""
    assert model.num_classes  # of stage 1
    is_index = name.isascii() and name.isdecimal() and len(name) < 10 and int(name) < model.num_classes - 1
    if is_index or name == "none" or name in model.classes:
        return
    raise RequestError(
        f"prompt={name[:80]!r}: is no class of this model; give a name that /v1/models lists, an index from 0 to "
        f"{model.num_classes - 2}, or none",
        param="prompt",
    )


def validate(kind: type[Any], content: Any) -> Any:
    """Return a JSON body as an object of a pydantic model. Raises RequestError for the first field at fault."""
    if not isinstance(content, Mapping):
        raise RequestError("the body is no JSON object; send an object with a prompt", code="invalid_json")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        name = str(first["loc"][0]) if first["loc"] else None
        if first["type"] == "extra_forbidden":
            raise RequestError(
                f"{str(name)[:80]!r}: unknown parameter; the parameters are {', '.join(kind.model_fields)}",
                param=name,
                code="unknown_parameter",
            ) from None
        code = "missing_required_parameter" if first["type"] == "missing" else "invalid_type"
        raise RequestError(f"{name}: {first['msg'][:200]}", param=name, code=code) from None
