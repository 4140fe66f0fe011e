"""Captioners: captions from the source's own texts, or from a vision-language model."""

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image, ImageOps

from pixart.config.captions import CaptionsConfig
from pixart.data.captions.text import shorten
from pixart.data.captions.validation import validate_answer
from pixart.data.captions.vllm_engine import context_length, make_engine

if TYPE_CHECKING:
    from pixart.data.sources.base import Item

PATCH_SIZE = 32  # pixels per side of the image area that one token stands for
MAX_PIXELS = 512 * 512  # larger images are resized to this for the model: 256 tokens
MAX_ASPECT = 100  # longer over shorter side; the image processor of Qwen refuses more than 200
MAX_NUM_SEQS = 256  # images that the engine captions concurrently
MAX_IN_FLIGHT = 384  # requests submitted at a time: half as many again, so that the engine never waits for images
NORMAL_FINISH_REASONS = ("stop", "length")  # an engine that shuts down returns its requests as aborted
RETRY_TEMPERATURE = 0.7  # at least; greedy decoding would repeat the same answer for any seed
NUM_ATTEMPTS = 2  # per image or request
SEEDS = 2**31  # exclusive end of the seeds of first attempts: a part stores seeds as int32


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionRequest:
    """An image to be captioned."""

    row: int
    image: Image.Image
    item: "Item"  # the source item that the image was decoded from
    digest: bytes  # of the item's data


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    """A caption with its short form, and the reason why it is rejected."""

    text: str
    short: str  # the first sentence
    problem: str  # "", or one of `validation.Problem`
    seed: int  # of the attempt that produced this caption


class Captioner(Protocol):
    """An object that captions a stream of images."""

    name: str  # identifies the captioner and everything that its captions depend on
    model: str
    prompt_hash: str  # of the instruction
    sampling: str  # JSON
    reads_source_text: bool  # whether captions are the source's texts, so that an item needs one

    def prepare(self, image: Image.Image) -> Image.Image:
        """Resize an image for the model. Called by the decoding threads, ahead of `stream`."""
        ...

    def stream(self, requests: Iterable[CaptionRequest]) -> Iterator[tuple[int, Caption]]:
        """Yield the row and caption of each request, in the order of completion."""
        ...


def make_captioner(kind: str, *, model: str, captions: CaptionsConfig | None = None, dtype: str = "auto") -> Captioner:
    """Create the captioner `labels` or `vllm`.

    `model` is the folder or hub name of a Qwen3-VL model; it, `captions` and `dtype` are for vLLM only.
    Raises ValueError for another kind, or if vLLM is not installed.
    """
    if kind == "labels":
        return LabelsCaptioner()
    if kind == "vllm":
        return VllmCaptioner(model, captions or CaptionsConfig(), dtype)
    raise ValueError(f"captioner {kind!r}: must be labels or vllm")


class LabelsCaptioner:
    """Uses each item's text as its caption, or "a photo of a NAME" if the text is the name of a class."""

    name = model = "labels"
    prompt_hash = sampling = ""
    reads_source_text = True

    def prepare(self, image: Image.Image) -> Image.Image:
        return image

    def stream(self, requests: Iterable[CaptionRequest]) -> Iterator[tuple[int, Caption]]:
        for request in requests:
            text = class_caption(request.item.text) if request.item.text_is_class else request.item.text
            yield request.row, Caption(text=text, short=shorten(text), problem="", seed=0)


def class_caption(name: str) -> str:
    """Return the caption of a class. Of several names, as WordNet lists them ("tench, Tinca tinca"), use the first."""
    name = name.split(",")[0]
    return f"a photo of {indefinite_article(name)} {name}"


def indefinite_article(words: str) -> str:
    """Return "an" before a vowel sound and "a" otherwise, as far as the spelling shows the sound."""
    vowel = re.match(r"(?!eu|ewe|one\b|once|uni(?!n|m)|u[ks]|ut[ei])[aeiou]|hour|honou?r|honest|heir", words.lower())
    return "an" if vowel else "a"


class VllmCaptioner:
    """Captions images with a vLLM engine.

    The instruction precedes the image, so prefix caching computes it once for all images. The engine runs in a
    separate process and generates while this process decodes, screens and preprocesses the next images. Unlike a
    call of `LLM.chat`, which drains before it returns, the stream keeps the engine's batch full.
    """

    reads_source_text = False

    def __init__(self, model: str, captions: CaptionsConfig, dtype: str):
        try:
            import vllm
        except ModuleNotFoundError as error:
            raise ValueError(f"captioner 'vllm': {error}; install vllm, or choose the captioner 'labels'") from None
        settings = sampling_settings(captions)
        described = ", ".join(f"{key} {value}" for key, value in settings.items())
        self.model, self.prompt_hash = model, prompt_hash(captions.image_instruction)
        self.sampling = json.dumps({**settings, "vllm": vllm.__version__})
        self.name = f"{model}, vllm {vllm.__version__}, {described}, instruction {self.prompt_hash}"
        self.num_attempts = NUM_ATTEMPTS
        self.captions = captions
        self._engine = make_engine(
            model,
            max_model_len=context_length(captions.image_instruction, captions.max_tokens),
            dtype=dtype,
            max_num_seqs=MAX_NUM_SEQS,
            limit_mm_per_prompt={"image": 1, "video": 0},
            mm_processor_kwargs={"max_pixels": MAX_PIXELS},
            mm_processor_cache_gb=0,  # no image is requested twice
        )
        tokenizer: Any = self._engine.get_tokenizer()
        prompt = tokenizer.apply_chat_template(
            conversation(captions.image_instruction, {"type": "image"}), tokenize=False, add_generation_prompt=True
        )
        self._prompt_token_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]  # the same for all images

    def sampling_params(self, attempt: int, seed: int) -> Any:
        """Return the `vllm.SamplingParams` of an attempt."""
        import vllm

        return vllm.SamplingParams(**attempt_sampling(self.captions, attempt), seed=seed)

    def prepare(self, image: Image.Image) -> Image.Image:
        return resize_for_model(image)

    def stream(self, requests: Iterable[CaptionRequest]) -> Iterator[tuple[int, Caption]]:
        in_flight: dict[str, InFlight] = {}  # by the request id that outputs carry
        remaining = iter(requests)
        try:
            while True:
                for request in islice(remaining, MAX_IN_FLIGHT - len(in_flight)):
                    self._enqueue(request, 0, in_flight)
                if not in_flight:
                    return
                yield from self._step(in_flight)
        finally:
            if in_flight:  # the consumer stopped early: the next stream must not receive these outputs
                with suppress(Exception):  # a dead engine must not hide the exception that ended the stream
                    self._engine.llm_engine.abort_request(
                        [pending.engine_id for pending in in_flight.values()], internal=True
                    )

    def _enqueue(self, request: CaptionRequest, attempt: int, in_flight: "dict[str, InFlight]") -> None:
        prompt = {
            "prompt_token_ids": self._prompt_token_ids,
            "multi_modal_data": {"image": resize_for_model(request.image)},
            "multi_modal_uuids": {"image": [request.digest.hex()]},  # saves the engine hashing the pixels
        }
        seed = attempt_seed(self.captions, request.digest, attempt)
        (engine_id,) = self._engine.enqueue(prompt, self.sampling_params(attempt, seed), use_tqdm=False)
        in_flight[engine_id.partition("-")[0]] = InFlight(
            request=request, attempt=attempt, seed=seed, engine_id=engine_id
        )

    def _step(self, in_flight: "dict[str, InFlight]") -> Iterator[tuple[int, Caption]]:
        """Run one engine step and yield finished captions; a caption with a problem is attempted once more."""
        for output in self._engine.llm_engine.step():
            if not output.finished:
                continue
            finished, answer = in_flight.pop(output.request_id), output.outputs[0]
            if answer.finish_reason not in NORMAL_FINISH_REASONS:
                raise RuntimeError(f"vLLM did not finish a caption: finish reason {answer.finish_reason!r}")
            text, problem = validate_answer(answer.text, truncated=answer.finish_reason == "length")
            if problem and finished.attempt + 1 < self.num_attempts:
                self._enqueue(finished.request, finished.attempt + 1, in_flight)
            else:
                yield (
                    finished.request.row,
                    Caption(text=text, short=shorten(text), problem=problem or "", seed=finished.seed),
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class InFlight:
    """A request that was submitted to the engine."""

    request: CaptionRequest
    attempt: int
    seed: int
    engine_id: str  # the request id of the outputs and a random suffix, which the engine adds internally


def prompt_hash(instruction: str) -> str:
    """Return eight hexadecimal digits that identify an instruction."""
    return sha256(instruction.encode()).hexdigest()[:8]


def sampling_settings(captions: CaptionsConfig) -> dict[str, float | int]:
    """Return the sampling of the first attempt, without its seed, by vLLM's names."""
    return {
        "temperature": captions.temperature,
        "top_p": captions.top_p,
        "top_k": captions.top_k,
        "max_tokens": captions.max_tokens,
    }


def attempt_sampling(captions: CaptionsConfig, attempt: int) -> dict[str, float | int]:
    """Return the sampling of an attempt, which counts from 0.

    A further attempt never has a lower temperature than the first one: if the first is sampled already, another seed
    is enough for another answer.
    """
    settings = sampling_settings(captions)
    return {**settings, "temperature": max(captions.temperature, RETRY_TEMPERATURE)} if attempt else settings


def attempt_seed(captions: CaptionsConfig, digest: bytes, attempt: int) -> int:
    """Return the seed of an attempt for the image, or the request, with a digest of at least 4 bytes.

    Sampled captions have different seeds, as the same random numbers would favour the same words in all of them, and
    the digest makes the seed independent of the order and the batch. Greedy decoding needs no seed: its attempts have
    the seeds 0 and 1.
    """
    first = int.from_bytes(digest[:4]) % (SEEDS - NUM_ATTEMPTS) if captions.temperature > 0 else 0
    return first + attempt


def conversation(instruction: str, content: dict[str, Any]) -> list[Any]:
    """Return the chat messages for one image, whose message part is `content`."""
    return [{"role": "system", "content": instruction}, {"role": "user", "content": [content]}]


def resize_for_model(image: Image.Image) -> Image.Image:
    """Center-crop an image to MAX_ASPECT and shrink it to MAX_PIXELS, as the model's processor would.

    Smaller images are returned unchanged.
    """
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) > longest:
        image = ImageOps.fit(image, (min(width, longest), min(height, longest)))
    scale = math.sqrt(MAX_PIXELS / (image.width * image.height))
    if scale >= 1:
        return image
    width, height = (max(1, math.floor(side * scale / PATCH_SIZE)) * PATCH_SIZE for side in image.size)
    longest = MAX_ASPECT * min(width, height)  # rounding may have increased the aspect ratio
    return image.resize((min(width, longest), min(height, longest)), Image.Resampling.BICUBIC, reducing_gap=1.0)
