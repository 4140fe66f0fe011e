"""Configuration of captions: the instructions of the captioning model, and how its answers are sampled."""

from dataclasses import dataclass
from pathlib import Path
from typing import NewType

from pixart.config.limits import require_at_least, require_positive

FILE_PREFIX = "@"  # of an instruction that is given as the path of a file
MAX_INSTRUCTION = 8_000  # characters
MAX_TOKENS = 4_096  # of an answer

Instruction = NewType("Instruction", str)  # a key of this type can be given as `@FILE`

STYLE = (
    "Write noun phrases with what can be seen: the main subject first, then colour, material, number, size, position, "
    "setting, light, and the kind of picture. At most three sentences and 60 words. The first sentence names the main "
    "subject, has at most 20 words and stands alone. No names that are guessed, no opinions, nothing outside the "
    "picture, no words such as 'the image shows'. Answer with this text alone."
)
IMAGE_INSTRUCTION = Instruction(f"You write captions for images, from which a text-to-image model learns. {STYLE}")
REWRITE_INSTRUCTION = Instruction(
    "You rewrite a user's short request for a picture as the caption of that picture, from which a text-to-image model "
    f"paints it. Keep all that the request says; add only what it leaves open. {STYLE}"
)

ATTRIBUTE_STYLE = (
    "Give only what a renderer needs: shapes, materials, surfaces, colours, light, depth, and the position of the "
    "camera. Join noun phrases and participles by commas and avoid verbs in the present tense; every phrase adds a "
    "visible detail that no other phrase has. Begin with the main subject and continue with the others. Write up to "
    "three sentences, each about one part of the picture, and end with a full stop. Leave out moods, ideas, purposes "
    "and remarks about the picture itself. Answer with this text alone."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionsConfig:
    """Instructions and sampling of the captioning model, for images and for the requests that are rewritten.

    Raises ValueError naming the field for a value out of range.
    """

    image_instruction: Instruction = IMAGE_INSTRUCTION
    """Instruction for the caption of an image, as text, or as @FILE for the text of a file."""

    rewrite_instruction: Instruction = REWRITE_INSTRUCTION
    """Instruction for rewriting a request as a caption, as text, or as @FILE for the text of a file."""

    temperature: float = 0.0
    """Temperature of the first attempt; 0 takes the most probable token. A second attempt has at least 0.7."""

    top_p: float = 1.0
    """Probability of the smallest set of most probable tokens that a token is sampled from; 1 takes all tokens."""

    top_k: int = 0
    """Number of most probable tokens that a token is sampled from; 0 takes all tokens."""

    max_tokens: int = 120
    """Largest number of tokens of a caption."""

    def __post_init__(self) -> None:
        for name, text in (
            ("image_instruction", self.image_instruction),
            ("rewrite_instruction", self.rewrite_instruction),
        ):
            if not text.strip():
                raise ValueError(f"{name}: is empty; give a text, or {FILE_PREFIX}FILE")
            if text.startswith(FILE_PREFIX):
                raise ValueError(
                    f"{name}: the text begins with {FILE_PREFIX}, which stands for a file; begin otherwise"
                )
            if len(text) > MAX_INSTRUCTION:
                raise ValueError(f"{name}: has {len(text)} characters; it must have at most {MAX_INSTRUCTION}")
        require_at_least(0, temperature=self.temperature, top_k=self.top_k)
        require_at_least(1, max_tokens=self.max_tokens)
        require_positive(top_p=self.top_p)
        if self.top_p > 1:
            raise ValueError(f"top_p={self.top_p}: must be more than 0 and at most 1")
        if self.max_tokens > MAX_TOKENS:
            raise ValueError(f"max_tokens={self.max_tokens}: must be at most {MAX_TOKENS}")


def visible_attributes() -> CaptionsConfig:
    """Return the preset of sampled captions that list what is visible, dense in attributes and without verbs.

    Temperature, top_p, top_k and max_tokens are those of the ImageNet-21k captions by Qwen3-VL that the original
    stage 2 was trained on; the instructions ask for the same style.
    """
    return CaptionsConfig(
        image_instruction=Instruction(f"You describe an image so that it can be rendered again. {ATTRIBUTE_STYLE}"),
        rewrite_instruction=Instruction(
            "You rewrite a user's request for a picture as the description that the picture is rendered from. Keep "
            "the request's meaning and all of its objects, and add no objects; show an action as the state that can "
            f"be seen. Name every object instead of using a pronoun. {ATTRIBUTE_STYLE}"
        ),
        temperature=0.7,
        top_p=0.85,
        top_k=30,
        max_tokens=120,
    )


def read_instruction(text: str) -> Instruction:
    """Return the instruction that a value stands for: the text itself or, of `@FILE`, that of the file.

    White space around the text is removed. Raises ValueError if the file cannot be read.
    """
    if not text.startswith(FILE_PREFIX):
        return Instruction(text.strip())
    try:
        return Instruction(Path(text.removeprefix(FILE_PREFIX)).read_text(encoding="utf-8").strip())
    except OSError as error:
        raise ValueError(f"{text}: cannot be read; {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{text}: is not UTF-8 text; {error}") from None
