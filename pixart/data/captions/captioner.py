"""Captions of images: what the source says itself, or what a vision-language model sees."""

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image, ImageOps

from pixart.data.captions.text import short_form
from pixart.data.captions.validation import judge
from pixart.data.captions.vllm_engine import make_engine

if TYPE_CHECKING:
    from pixart.data.sources.base import Item

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
TOKEN = 32  # pixels of an image's side that make a token
MAX_PIXELS = 512 * 512  # an image that is larger reaches the model at this size: 256 tokens
MAX_ASPECT = 100  # longest over shortest side; Qwen's image processor refuses more than 200
MAX_NUM_SEQS = 256  # images that the engine captions at once
WAITING = 384  # that it may have at a time: those and half as many for which it never has to wait
FINISHED = ("stop", "length")  # an engine that is told to end calls off what is under way, as if it were done
RETRY_TEMPERATURE = 0.7  # with the most likely tokens, another seed would change nothing


@dataclass(frozen=True, kw_only=True, slots=True)
class Given:
    """An image that wants a caption."""

    row: int
    image: Image.Image
    item: "Item"  # of the source, that the image is of
    digest: bytes  # of the item's data


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    text: str
    short: str  # the first sentence
    problem: str  # "", or one of `validation.Problem`
    seed: int  # of the attempt that made it


class Captioner(Protocol):
    name: str  # identifies the captioner and all that its captions depend on
    model: str
    prompt_hash: str  # of the instruction
    sampling: str  # JSON

    def prepare(self, image: Image.Image) -> Image.Image:
        """As the model will see it; for the threads that decode, ahead of `stream`."""
        ...

    def stream(self, given: Iterable[Given]) -> Iterator[tuple[int, Caption]]:
        """The captions, each with its row, in whatever order they are ready."""
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

    def prepare(self, image: Image.Image) -> Image.Image:
        return image

    def stream(self, given: Iterable[Given]) -> Iterator[tuple[int, Caption]]:
        for each in given:
            text = class_caption(each.item.text) if each.item.text_is_class else each.item.text
            yield each.row, Caption(text=text, short=short_form(text), problem="", seed=0)


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
    A call of `LLM.chat` would end when its last caption is done; here the engine has always others to go on with.
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
        self._engine = make_engine(
            model,
            dtype=dtype,
            max_num_seqs=MAX_NUM_SEQS,
            limit_mm_per_prompt={"image": 1, "video": 0},
            mm_processor_kwargs={"max_pixels": MAX_PIXELS},
            mm_processor_cache_gb=0,  # no image comes twice
        )
        tokenizer: Any = self._engine.get_tokenizer()
        asked = tokenizer.apply_chat_template(
            conversation({"type": "image"}), tokenize=False, add_generation_prompt=True
        )
        self._prompt = tokenizer(asked, add_special_tokens=False)["input_ids"]  # the same for all images

    def prepare(self, image: Image.Image) -> Image.Image:
        return prepare(image)

    def stream(self, given: Iterable[Given]) -> Iterator[tuple[int, Caption]]:
        waiting: dict[str, Waiting] = {}  # by the engine's id
        images = iter(given)
        try:
            while True:
                for each in islice(images, WAITING - len(waiting)):
                    self._enqueue(each, 0, waiting)
                if not waiting:
                    return
                yield from self._finished(waiting)
        finally:
            if waiting:  # the stream is left before its end: the next must hear nothing of it
                with suppress(Exception):  # of an engine that is gone, which must not hide why the stream is left
                    self._engine.llm_engine.abort_request([each.inner for each in waiting.values()], internal=True)

    def _enqueue(self, given: Given, attempt: int, waiting: "dict[str, Waiting]") -> None:
        prompt = {
            "prompt_token_ids": self._prompt,
            "multi_modal_data": {"image": prepare(given.image)},
            "multi_modal_uuids": {"image": [given.digest.hex()]},  # or the engine hashes the pixels
        }
        (inner,) = self._engine.enqueue(prompt, self._attempts[attempt][0], use_tqdm=False)
        waiting[inner.partition("-")[0]] = Waiting(given=given, attempt=attempt, inner=inner)

    def _finished(self, waiting: "dict[str, Waiting]") -> Iterator[tuple[int, Caption]]:
        """What the engine has next; a caption that has a problem is written once more."""
        for output in self._engine.llm_engine.step():
            if not output.finished:
                continue
            each, answer = waiting.pop(output.request_id), output.outputs[0]
            if answer.finish_reason not in FINISHED:
                raise RuntimeError(f"vLLM gave an image up: {answer.finish_reason}")
            text, found = judge(answer.text, answer.finish_reason == "length")
            if found and each.attempt + 1 < len(self._attempts):
                self._enqueue(each.given, each.attempt + 1, waiting)
            else:
                seed = self._attempts[each.attempt][1]
                yield each.given.row, Caption(text=text, short=short_form(text), problem=found or "", seed=seed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """An image that the engine has, and its `inner` id there: it adds random characters, and answers without them."""

    given: Given
    attempt: int
    inner: str


def prompt_hash(instruction: str) -> str:
    return sha256(instruction.encode()).hexdigest()[:8]


def conversation(content: dict[str, Any]) -> list[Any]:
    """The instruction, and the image as `content`."""
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": [content]}]


def prepare(image: Image.Image) -> Image.Image:
    """Cut to its middle where it is too long, and shrunk to MAX_PIXELS as the model would; otherwise as it is."""
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) > longest:
        image = ImageOps.fit(image, (min(width, longest), min(height, longest)))
    scale = math.sqrt(MAX_PIXELS / (image.width * image.height))
    if scale >= 1:
        return image
    width, height = (max(1, math.floor(side * scale / TOKEN)) * TOKEN for side in image.size)
    longest = MAX_ASPECT * min(width, height)  # by rounding, it may have become too long
    return image.resize((min(width, longest), min(height, longest)), Image.Resampling.BICUBIC, reducing_gap=1.0)
