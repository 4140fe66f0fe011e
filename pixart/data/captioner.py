"""Captions of images: what the source says itself, or what a vision-language model sees."""

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image, ImageOps

if TYPE_CHECKING:
    from pixart.data.sources import Item

INSTRUCTION = (
    "You write captions for images, from which a text-to-image model learns. Describe what can be seen in one or two "
    "plain sentences of at most 60 words: the main subject, its look and what it does, where things are, the setting, "
    "the light, and the kind of picture. Do not guess names or what lies outside the picture, and do not begin with "
    "words such as 'The image shows'. Answer with the caption alone."
)
MAX_PIXELS = 512 * 512  # an image that is larger reaches the model at this size: 256 tokens of 32 x 32 pixels
MAX_MODEL_LEN = 1024  # tokens: instruction, image and caption
MAX_ASPECT = 100  # longest over shortest side; Qwen's image processor refuses more than 200, and with it the whole call


@dataclass(frozen=True, kw_only=True, slots=True)
class Caption:
    text: str
    short: str = ""
    problem: str = ""
    seed: int = 0


class Captioner(Protocol):
    name: str  # identifies the captioner and all that its captions depend on
    model: str
    prompt_hash: str
    sampling: str

    def stream(self, given: "Iterator[tuple[int, Image.Image, Item]]") -> "Iterator[tuple[int, Caption]]": ...

    def caption(self, images: list[Image.Image], items: "list[Item]") -> list[str]:
        """One caption for each image, which is that of the item at its place."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the model's tokens are chosen; each image's are drawn from `seed` alone, whatever it is batched with."""

    temperature: float = 0.0  # 0: the most likely token, always
    max_tokens: int = 120
    seed: int = 0


def make_captioner(
    kind: str, *, model: str, sampling: Sampling | None = None, enforce_eager: bool = False, dtype: str = "auto"
) -> Captioner:
    """`labels`, or `vllm` with the folder or hub name of a Qwen3-VL `model` and what follows.

    `enforce_eager` leaves out CUDA graphs and compilation, which take minutes to set up. Raises ValueError for
    another kind, or where vLLM is not installed.
    """
    if kind == "labels":
        return LabelsCaptioner()
    if kind == "vllm":
        return VllmCaptioner(model, sampling or Sampling(), enforce_eager, dtype)
    raise ValueError(f"captioner {kind!r}: must be labels or vllm")


class LabelsCaptioner:
    """The item's own text as it is; where that is the name of a class, `a photo of a NAME`."""

    name = model = "labels"
    prompt_hash = sampling = ""

    def stream(self, given):
        for row, image, item in given:
            text = self.caption([image], [item])[0]
            yield row, Caption(text=text, short=re.split(r"(?<=[.!?]) ", text)[0])

    def caption(self, images: list[Image.Image], items: "list[Item]") -> list[str]:
        return [class_caption(item.text) if item.text_is_class else item.text for item in items]


def class_caption(name: str) -> str:
    """Of the synonyms that WordNet lists with commas, as in `tench, Tinca tinca`, the first is taken."""
    name = name.split(",")[0]
    return f"a photo of {article(name)} {name}"


def article(words: str) -> str:
    """`an` before a vowel's sound, as far as English spelling tells it."""
    vowel = re.match(r"(?!eu|ewe|one\b|once|uni(?!n|m)|u[ks]|ut[ei])[aeiou]|hour|honou?r|honest|heir", words.lower())
    return "an" if vowel else "a"


class VllmCaptioner:
    """One vLLM engine. The instruction stands before the image, so that its prefix is computed once for all images."""

    def __init__(self, model: str, sampling: Sampling, enforce_eager: bool, dtype: str):
        try:
            import vllm
        except ModuleNotFoundError as error:
            raise ValueError(f"captioner 'vllm': {error}; install vllm, or choose the captioner labels") from None
        settings = ", ".join(f"{key} {value}" for key, value in asdict(sampling).items())
        prompt = sha256(INSTRUCTION.encode()).hexdigest()[:8]
        self.name = f"{model}, vllm {vllm.__version__}, {settings}, instruction {prompt}"
        self._sampling = vllm.SamplingParams(**asdict(sampling))
        self._engine = vllm.LLM(
            model=model,
            dtype=dtype,
            enforce_eager=enforce_eager,
            max_model_len=MAX_MODEL_LEN,
            limit_mm_per_prompt={"image": 1, "video": 0},
            mm_processor_kwargs={"max_pixels": MAX_PIXELS},
            mm_processor_cache_gb=0,  # no image comes twice
        )

    def caption(self, images: list[Image.Image], items: "list[Item]") -> list[str]:
        if not images:
            return []
        outputs = self._engine.chat([_conversation(image) for image in images], self._sampling, use_tqdm=False)
        return [normalize(output.outputs[0].text, output.outputs[0].finish_reason == "length") for output in outputs]


def _conversation(image: Image.Image) -> list[Any]:
    width, height = image.size
    longest = MAX_ASPECT * min(width, height)
    if max(width, height) > longest:
        image = ImageOps.fit(image, (min(width, longest), min(height, longest)))  # its middle
    return [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": [{"type": "image_pil", "image_pil": image}]},
    ]


def normalize(text: str, cut: bool) -> str:
    """Every run of white space becomes one space. A text that was `cut` ends with its last whole sentence, if any."""
    text = " ".join(text.split())
    end = re.search(r".*[.!?](?=\s|$)", text)
    return end.group() if cut and end else text
