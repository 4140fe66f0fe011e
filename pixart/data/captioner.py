"""Captions of images: what the source says itself, or what a vision-language model sees."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image, ImageOps

from pixart.data.caption_checks import judge
from pixart.data.caption_text import short_form

if TYPE_CHECKING:
    from pixart.data.sources import Item

    Given = tuple[int, Image.Image, Item]  # row, image, and the source's item that it is of

STYLE = (
    "Write noun phrases with what can be seen: the main subject first, then colour, material, number, size, position, "
    "setting, light, and the kind of picture. At most three sentences and 60 words. The first sentence names the main "
    "subject, has at most 20 words and stands alone. No names that are guessed, no opinions, nothing outside the "
    "picture, no words such as 'the image shows'. Answer with this text alone."
)
INSTRUCTION = f"You write captions for images, from which a text-to-image model learns. {STYLE}"
REWRITING = (
    "You rewrite a user's short request for a picture as the caption of that picture, from which a text-to-image model "
    f"paints it. Keep all that the request says; add only what it leaves open. {STYLE}"
)
MAX_PIXELS = 512 * 512  # an image that is larger reaches the model at this size: 256 tokens of 32 x 32 pixels
MAX_MODEL_LEN = 1024  # tokens: instruction, image and caption
MAX_ASPECT = 100  # longest over shortest side; Qwen's image processor refuses more than 200, and with it the whole call
CHUNK = 8  # images that are handed to the engine together
WAITING = 256  # images that the engine may have at a time
RETRY_TEMPERATURE = 0.7  # with the most likely tokens, another seed would change nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    text: str
    short: str  # the first sentence
    problem: str  # "", or one of `caption_checks.Problem`
    seed: int  # of the attempt that made it


class Captioner(Protocol):
    name: str  # identifies the captioner and all that its captions depend on
    model: str
    prompt_hash: str  # of the instruction
    sampling: str  # JSON

    def stream(self, given: "Iterable[Given]") -> "Iterator[tuple[int, Caption]]":
        """The captions of (row, image, item), each with its row, in whatever order they are ready."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the model's tokens are chosen; each image's are drawn from `seed` alone, whatever it is batched with."""

    temperature: float = 0.0  # 0: the most likely token, always
    max_tokens: int = 120
    seed: int = 0


def make_captioner(kind: str, *, model: str, sampling: Sampling | None = None, dtype: str = "auto") -> Captioner:
    """`labels`, or `vllm` with the folder or hub name of a Qwen3-VL `model` and what follows.

    Raises ValueError for another kind, or where vLLM is not installed.
    """
    if kind == "labels":
        return LabelsCaptioner()
    if kind == "vllm":
        return VllmCaptioner(model, sampling or Sampling(), dtype)
    raise ValueError(f"captioner {kind!r}: must be labels or vllm")


class LabelsCaptioner:
    """The item's own text as it is; where that is the name of a class, `a photo of a NAME`."""

    name = model = "labels"
    prompt_hash = sampling = ""

    def stream(self, given: "Iterable[Given]") -> Iterator[tuple[int, Caption]]:
        for row, _, item in given:
            text = class_caption(item.text) if item.text_is_class else item.text
            yield row, Caption(text=text, short=short_form(text), problem="", seed=0)


def class_caption(name: str) -> str:
    """Of the synonyms that WordNet lists with commas, as in `tench, Tinca tinca`, the first is taken."""
    name = name.split(",")[0]
    return f"a photo of {article(name)} {name}"


def article(words: str) -> str:
    """`an` before a vowel's sound, as far as English spelling tells it."""
    vowel = re.match(r"(?!eu|ewe|one\b|once|uni(?!n|m)|u[ks]|ut[ei])[aeiou]|hour|honou?r|honest|heir", words.lower())
    return "an" if vowel else "a"


class VllmCaptioner:
    """One vLLM engine. The instruction stands before the image, so that its prefix is computed once for all images.

    The engine is a process of its own: it generates while this one decodes, screens and renders the next images.
    """

    def __init__(self, model: str, sampling: Sampling, dtype: str):
        try:
            import vllm
        except ModuleNotFoundError as error:
            raise ValueError(f"captioner 'vllm': {error}; install vllm, or choose the captioner labels") from None
        settings = ", ".join(f"{key} {value}" for key, value in asdict(sampling).items())
        self.model, self.prompt_hash = model, prompt_hash(INSTRUCTION)
        self.sampling = json.dumps({**asdict(sampling), "vllm": vllm.__version__})
        self.name = f"{model}, vllm {vllm.__version__}, {settings}, instruction {self.prompt_hash}"
        first, again = sampling, replace(sampling, seed=sampling.seed + 1, temperature=RETRY_TEMPERATURE)
        self._attempts = [(vllm.SamplingParams(**asdict(how)), how.seed) for how in (first, again)]
        self._engine = vllm.LLM(
            model=model,
            dtype=dtype,
            enforce_eager=not vllm.platforms.current_platform.is_cuda_alike(),  # a CPU has no graphs, and compiles long
            max_model_len=MAX_MODEL_LEN,
            limit_mm_per_prompt={"image": 1, "video": 0},
            mm_processor_kwargs={"max_pixels": MAX_PIXELS},
            mm_processor_cache_gb=0,  # no image comes twice
        )

    def stream(self, given: "Iterable[Given]") -> Iterator[tuple[int, Caption]]:
        waiting: dict[str, tuple[Given, int]] = {}  # by the engine's id: what was given, and which attempt it is
        images = iter(given)
        while chunk := list(islice(images, CHUNK)):
            self._enqueue(chunk, 0, waiting)
            while len(waiting) >= WAITING:
                yield from self._finished(waiting)
        while waiting:
            yield from self._finished(waiting)

    def _enqueue(self, chunk: "list[Given]", attempt: int, waiting: "dict[str, tuple[Given, int]]") -> None:
        conversations = [_conversation(image) for _, image, _ in chunk]
        ids = self._engine.enqueue_chat(conversations, self._attempts[attempt][0], use_tqdm=False)
        for id, each in zip(ids, chunk, strict=True):
            waiting[id.partition("-")[0]] = (each, attempt)  # the engine adds random characters, and answers without

    def _finished(self, waiting: "dict[str, tuple[Given, int]]") -> Iterator[tuple[int, Caption]]:
        """What the engine has next; a caption that has a problem is written once more."""
        for output in self._engine.llm_engine.step():
            if not output.finished:
                continue
            each, attempt = waiting.pop(output.request_id)
            text, found = judge(output.outputs[0].text, output.outputs[0].finish_reason == "length")
            if found and attempt + 1 < len(self._attempts):
                self._enqueue([each], attempt + 1, waiting)
            else:
                seed = self._attempts[attempt][1]
                yield each[0], Caption(text=text, short=short_form(text), problem=found or "", seed=seed)


def prompt_hash(instruction: str) -> str:
    return sha256(instruction.encode()).hexdigest()[:8]


def _conversation(image: Image.Image) -> list[Any]:
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) > longest:
        image = ImageOps.fit(image, (min(width, longest), min(height, longest)))  # its middle
    return [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": [{"type": "image_pil", "image_pil": image}]},
    ]
