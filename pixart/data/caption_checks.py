"""What is wrong with a caption that a model wrote, as far as its words tell: pure functions, each with one name."""

import re
from collections import Counter
from enum import StrEnum

REFUSAL = re.compile(
    r"^\W*(i'?m sorry|i am sorry|sorry,|i apologi[sz]e|unfortunately, i\b|as an ai\b|i'?m (not able|unable)\b|"
    r"i am (not able|unable)\b|i (can ?not|can'?t|could ?n't|won'?t)\b"
    r"|there is no (image|picture|photo)\b|no (image|picture|photo) (was|is|has been)\b|please (provide|upload)\b)",
    re.IGNORECASE,
)
PICTURE = r"(?:image|picture|photo|photograph|photography|illustration|painting|drawing|scene|frame|shot|snapshot)"
TELLS = (
    r"(?:shows?|depicts?|displays?|features?|captures?|portrays?|presents?|illustrates?|contains?|is (?:of|showing)|"
    r"appears? to|seems? to|is an? (?:image|picture|photo|photograph))"
)
NARRATION = re.compile(
    rf"^\W*(?:(?:the|this|an?|in the|in this)(?: \w+){{0,3}} {PICTURE},? (?:{TELLS}|we (?:can )?see|there (?:is|are)|"
    rf"(?:you|one) can see)\b|this is an? (?:\w+ ){{0,3}}{PICTURE}\b|"
    rf"(?:in|within) (?:the|this)(?: \w+){{0,2}} {PICTURE}\b|we (?:can )?see\b|"
    rf"here (?:is|are|we see)\b|(?:sure|certainly|of course)[,!]|caption:|description:)",
    re.IGNORECASE,
)
NO_TEXT = re.compile(r"<\|[a-z_]+\|>|</?[a-z]+>|```|^\s*[\[{]|^\s*(?:[-*#]|\d+\.)\s|\*\*|[\x00-\x08\x0b-\x1f]|�")
RUN, SPAN, TIMES = 4, 3, 4  # one word so often in a row; so many words that come so often


class Problem(StrEnum):
    """Why a caption is not used."""

    EMPTY = "empty"
    CUT = "cut"
    REFUSAL = "refusal"
    NARRATION = "narration"
    REPETITION = "repetition"
    NO_TEXT = "no text"


def problem(text: str, cut: bool = False) -> Problem | None:
    """The first that is found; `cut` says that the text ended with the model's tokens, in the middle of a sentence."""
    text = text.replace("\u2019", "'")  # typographic apostrophe
    if not re.search(r"\w{2}", text):
        return Problem.EMPTY
    if NO_TEXT.search(text):
        return Problem.NO_TEXT
    if repeats(text):
        return Problem.REPETITION
    if REFUSAL.search(text):
        return Problem.REFUSAL
    if NARRATION.search(text):
        return Problem.NARRATION
    return Problem.CUT if cut else None


def repeats(text: str) -> bool:
    """One word again and again, the same few words many times, or a whole sentence twice."""
    words = re.findall(r"[\w'-]+", text.lower())
    if any(len(set(words[at : at + RUN])) == 1 for at in range(len(words) - RUN + 1)):
        return True
    spans = Counter(tuple(words[at : at + SPAN]) for at in range(len(words) - SPAN + 1))
    if max(spans.values(), default=0) >= TIMES:
        return True
    sentences = [sentence for sentence in sentences_of(text.lower()) if len(sentence.split()) > SPAN]
    return len(set(sentences)) < len(sentences)


def sentences_of(text: str) -> list[str]:
    return [sentence for sentence in re.split(r"(?<=[.!?])\s+", text.strip()) if sentence]


def short_form(text: str, words: int = 25) -> str:
    """The first sentence; of one that is longer than `words`, the first clause, or its first words."""
    first = (sentences_of(text) or [""])[0]
    if len(first.split()) <= words:
        return first
    clause = re.split(r"[,;:]\s", first)[0]
    return clause if 3 <= len(clause.split()) <= words else " ".join(first.split()[:words])
