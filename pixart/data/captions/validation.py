"""Checks of a caption's text: what a model says where it fails, as far as it can be told from the words alone.

What stands in quotation marks is what a picture says, and is looked at by no check of words.
"""

import re
import unicodedata
from collections import Counter
from enum import StrEnum

from pixart.data.captions.text import normalize, sentences_of, straight, whole_sentences, words_of

QUOTED = re.compile(r"\"[^\"]*\"|(?<!\w)'[^']*(?:'\w[^']*)*'(?!\w)")

MARKUP = re.compile(
    r"<\|[^|>]*\|>|</?s>|\[/?INST\]|<<SYS>>|<(?:think|unk|pad|bos|eos)>|<image>"  # chat templates
    r"|</\w+>|<(?:br|p|div|img|span|html)\b[^>]*>"
    r"|```|\*\*[^*]+\*\*|__[^_]+__|\]\(|\\(?:n|u[0-9a-f]{4})"
    r"|^\s*(?:#{1,6}|[-*•]|\d{1,2}[.)])\s"
    r"|^\s*[\[{].*[\]}]\s*$|^\s*\{\s*['\"]",
    re.MULTILINE | re.DOTALL,
)
LEAST_LETTERS = 0.5  # of all characters but spaces

AI = r"(?:ai|artificial intelligence|(?:large |visual |vision-)?language model|text-based|virtual assistant)"
REFUSAL = re.compile(
    r"(?:but |however,? )?(?:"
    r"(?:i'?m|i am) (?:very |so |really |truly )?(?:sorry|afraid)\b"
    r"|sorry,? (?:but|i)\b|(?:my )?apologies\b|i (?:do )?apologi[sz]e\b|unfortunately,? (?:i|the image)\b"
    r"|i (?:can ?not|can'?t|could ?n'?o?t|am (?:unable|not able|an? )|will not|won'?t|do not|don'?t|must decline)\b"
    r"|i'?m (?:unable|not able|an? )\b|unable to (?:process|describe|see|view|identify|generate|provide)\b"
    rf"|as an? {AI}\b(?!-)|as a (?:language|text) model"
    r"|(?:there is )?no (?:image|picture|photo|prompt|text|request) (?:was |is |has been )?"
    r"(?:provided|given|attached|visible)"
    r"|(?:could you )?please (?:provide|upload|share|send|attach) (?:an?|the|your|me)\b"
    r"|it (?:seems|appears|looks)(?: like| that)? (?:you|(?:there is )?no (?:image|picture|photo))\b"
    r"|i (?:would )?need to see\b|the image (?:could not|can ?not|can'?t) be\b"
    r"|this (?:request|content|image) (?:violates|goes against)\b"
    r")",
    re.IGNORECASE,
)

PICTURE = (
    r"(?:image|picture|photo|photograph|snapshot|screenshot|illustration|painting|drawing|sketch|artwork|scene|render"
    r"|rendering|shot|close-up|caption|description)"
)
NO_ADJECTIVE = "of|in|on|at|with|by|from|to|for|near|behind|holding|is|are|a|an|the|this|displays?|shows?"
BETWEEN = rf"(?:(?!(?:{NO_ADJECTIVE})\b)[\w'-]+ ){{0,4}}?"
TELLS = (
    r"(?:shows?|showing|depicts?|depicting|features?|captures?|displays?|presents?|portrays?|illustrates?|contains?"
    r"|represents?|showcases?|highlights?|includes?|conveys?|describes?|reveals?|consists? of|focuses on"
    r"|appears to (?:be|show)|seems to (?:be|show))"
)
ADVERB = r"(?:also |clearly |simply |vividly |prominently |mainly )?"
FOLLOWS = r"(?:we|you|one|i|there|a|an|the|two|three|four|several|some|many|it|he|she|they|people)"
OPENING = re.compile(
    rf"(?:the|this|these|a|an) {BETWEEN}{PICTURE}s? {ADVERB}{TELLS}\b"
    rf"|(?:the|this) (?:given |provided )?(?:image|picture|photo|photograph) (?:is|has|was)\b"
    rf"|(?:this|it) is an? (?:[\w'-]+ ){{0,3}}{PICTURE}\b"
    r"|(?:pictured|depicted|shown) (?:here |in (?:the|this) \w+ )?(?:is|are)\b"
    rf"|(?:in|within) (?:the|this) {BETWEEN}{PICTURE}(?:,| {FOLLOWS}\b)"
    r"|(?:here,? |what )?(?:we|you|one|i|the viewer) (?:can |could |may )?(?:clearly |also )?(?:sees?|observe|notice)\b"
    r"|(?:sure|certainly|of course|okay|absolutely)\s*[,.!]|here(?:'s| is| are) (?:\w+ ){0,3}?"
    r"(?:caption|description|text|rewrit\w+|prompt|version)\b"
    r"|(?:image )?(?:caption|description|prompt|rewritten(?: \w+)?|answer|output|image|response)\s*:",
    re.IGNORECASE,
)
# Of a later sentence, less is sure: a pictured photo may itself show something.
LATER = re.compile(
    rf"this (?:picture|photo|photograph|caption|description) {ADVERB}{TELLS}\b"
    r"|(?:here,? )?(?:we|you|i) (?:can |could )?(?:also |clearly )?see\b",
    re.IGNORECASE,
)
# Whoever says so stands outside the picture, wherever in a sentence.
OUTSIDE = re.compile(
    r"\b(?:the|this) (?:provided |given |overall )?image\b(?! (?:of|on|onto|in|sensor)\b)", re.IGNORECASE
)

REPEATED_CHARACTER = re.compile(r"(\S)(?:\s*\1){11,}")
REPEATED_PIECE = re.compile(r"(\S{2,12}?)(?:\s*\1){5,}")
RUNS = {1: 4, 2: 4, 3: 3}  # words of a block: how often it comes in a row; of longer blocks, three times
LONGEST_BLOCK = 12
NGRAM, NGRAM_COUNT = 4, 4  # words, and how often they may come less one wherever they stand
LEAST_SENTENCE = 4  # words of a sentence that comes twice


class Problem(StrEnum):
    """Why a caption is not used."""

    EMPTY = "empty"
    CUT = "cut"
    REFUSAL = "refusal"
    NARRATION = "narration"
    REPETITION = "repetition"
    NO_TEXT = "no text"


def judge(answer: str, cut: bool) -> tuple[str, Problem | None]:
    """The caption that a model's answer is, and what is wrong with it; `cut` says that its tokens were used up.

    A cut answer ends with its last whole sentence; one that has none is kept as it is.
    """
    text = normalize(answer)
    whole = whole_sentences(text) if cut else text
    found = problem(whole if cut and whole else answer)
    return whole or text, found or (Problem.CUT if cut and not whole else None)


def problem(text: str) -> Problem | None:
    """The first that is found. White space counts: a list is one by its lines."""
    if not any(character.isalnum() for character in text):
        return Problem.EMPTY
    if no_text(text):
        return Problem.NO_TEXT
    said = unquoted(normalize(text))
    if is_refusal(said):
        return Problem.REFUSAL
    if repeats(said):
        return Problem.REPETITION
    return Problem.NARRATION if is_narration(said) else None


def unquoted(text: str) -> str:
    """With straight quotation marks and nothing between them."""
    return QUOTED.sub("''", straight(text))


def no_text(raw: str) -> bool:
    """Control and unassigned characters, markup, JSON, Markdown, tokens of a chat template, or hardly any letters."""
    kinds = [unicodedata.category(character) for character in raw if not character.isspace()]
    odd = "\N{REPLACEMENT CHARACTER}" in raw or any(kind in ("Cc", "Cn", "Co", "Cs") for kind in kinds)
    few = sum(kind[0] in "LM" for kind in kinds) < LEAST_LETTERS * len(kinds)
    return odd or few or bool(MARKUP.search(unquoted(raw)))


def is_refusal(text: str) -> bool:
    """A sentence that speaks of the model itself, of its limits or of an image that it has not got."""
    return any(REFUSAL.match(sentence) for sentence in sentences_of(text))


def is_narration(text: str) -> bool:
    """A sentence that begins with the image as its subject, or with the one who looks at it, or speaks of the image."""
    first, *later = sentences_of(text) or [""]
    return bool(OPENING.match(first) or OUTSIDE.search(text)) or any(LATER.match(sentence) for sentence in later)


def repeats(text: str) -> bool:
    """The same piece, words or sentence over and over."""
    if REPEATED_CHARACTER.search(text) or REPEATED_PIECE.search(text):
        return True
    found = words_of(text)
    ngrams = Counter(tuple(found[begin : begin + NGRAM]) for begin in range(len(found) - NGRAM + 1))
    told = Counter(tuple(words_of(sentence)) for sentence in sentences_of(text))
    again = any(count > 1 and len(sentence) >= LEAST_SENTENCE for sentence, count in told.items())
    return again or max(ngrams.values(), default=0) >= NGRAM_COUNT or has_run(found)


def has_run(found: list[str]) -> bool:
    """The same block of words several times in a row."""
    for length in range(1, LONGEST_BLOCK + 1):
        times = RUNS.get(length, 3)
        same = 0  # places in a row whose word is that of `length` places before
        for place in range(length, len(found)):
            same = same + 1 if found[place] == found[place - length] else 0
            if same >= length * (times - 1):
                return True
    return False
