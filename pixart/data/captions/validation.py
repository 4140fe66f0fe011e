"""Validation of generated captions: detects refusals, meta-commentary, repetition and markup in the text.

Quoted text is excluded from the checks of words, as it is usually text within the image.
"""

import re
import unicodedata
from collections import Counter
from enum import StrEnum

from pixart.data.captions.text import ascii_punctuation, complete_sentences, normalize, split_sentences, split_words

QUOTED = re.compile(r"\"[^\"]*\"|(?<!\w)'.*?'(?!\w)", re.DOTALL)
DIRECTION = re.compile("[\u202a-\u202e\u2066-\u2069]")
CLOSING = re.compile(r"'(?!\w)")

MARKUP = re.compile(
    r"<\|[^|>]*\|>|</?s>|\[/?INST\]|<<SYS>>|<(?:think|unk|pad|bos|eos)>|<image>"  # chat templates
    r"|</\w+>|<(?:br|p|div|img|span|html)\b[^>]*>"
    r"|```|\*\*[^*]+\*\*|__[^_]+__|\]\(|\\(?:n|u[0-9a-f]{4})"
    r"|^\s*(?:#{1,6}|[-*•]|\d{1,2}[.)])\s"
    r"|^\s*[\[{].*[\]}]\s*$|^\s*\{\s*['\"]",
    re.MULTILINE | re.DOTALL,
)
MIN_LETTER_SHARE = 0.5  # of all characters except whitespace

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

IMAGE_NOUN = (
    r"(?:image|picture|photo|photograph|snapshot|screenshot|illustration|painting|drawing|sketch|artwork|scene|render"
    r"|rendering|shot|close-up|caption|description)"
)
NON_ADJECTIVE = "of|in|on|at|with|by|from|to|for|near|behind|holding|is|are|a|an|the|this|displays?|shows?"
ADJECTIVES = rf"(?:(?!(?:{NON_ADJECTIVE})\b)[\w'-]+ ){{0,4}}?"
DEPICTS = (
    r"(?:shows?|showing|depicts?|depicting|features?|captures?|displays?|presents?|portrays?|illustrates?|contains?"
    r"|represents?|showcases?|highlights?|includes?|conveys?|describes?|reveals?|consists? of|focuses on"
    r"|appears to (?:be|show)|seems to (?:be|show))"
)
ADVERB = r"(?:also |clearly |simply |vividly |prominently |mainly )?"
CLAUSE_SUBJECT = r"(?:we|you|one|i|there|a|an|the|two|three|four|several|some|many|it|he|she|they|people)"
META_FIRST = re.compile(
    rf"(?:the|this|these|a|an) {ADJECTIVES}{IMAGE_NOUN}s? {ADVERB}{DEPICTS}\b"
    rf"|(?:the|this) (?:given |provided )?(?:image|picture|photo|photograph) (?:is|has|was)\b"
    rf"|(?:this|it) is an? (?:[\w'-]+ ){{0,3}}{IMAGE_NOUN}\b"
    r"|(?:pictured|depicted|shown) (?:here |in (?:the|this) \w+ )?(?:is|are)\b"
    rf"|(?:in|within) (?:the|this) {ADJECTIVES}{IMAGE_NOUN}(?:,| {CLAUSE_SUBJECT}\b)"
    r"|(?:here,? |what )?(?:we|you|one|i|the viewer) (?:can |could |may )?(?:clearly |also )?(?:sees?|observe|notice)\b"
    r"|(?:sure|certainly|of course|okay|absolutely)\s*[,.!]|here(?:'s| is| are) (?:\w+ ){0,3}?"
    r"(?:caption|description|text|rewrit\w+|prompt|version)\b"
    r"|(?:image )?(?:caption|description|prompt|rewritten(?: \w+)?|answer|output|image|response)\s*:",
    re.IGNORECASE,
)
# For later sentences, fewer patterns are reliable: the image may contain a photo that itself shows something.
META_LATER = re.compile(
    rf"this (?:picture|photo|photograph|caption|description) {ADVERB}{DEPICTS}\b"
    r"|(?:here,? )?(?:we|you|i) (?:can |could )?(?:also |clearly )?see\b",
    re.IGNORECASE,
)
# These words refer to the image as an object, anywhere in a sentence.
META_ANYWHERE = re.compile(
    r"\b(?:the|this) (?:provided |given |overall )?image\b(?! (?:of|on|onto|in|sensor)\b)", re.IGNORECASE
)

MAX_CHARACTERS = 20_000  # of a text that is checked; the patterns below would take seconds for a megabyte
REPEATED_CHARACTER = re.compile(r"(\S)(?:\s*\1){11,}")
REPEATED_SUBSTRING = re.compile(r"(\S{2,12}?)(?:\s*\1){5,}")
MIN_BLOCK_REPEATS = {1: 4, 2: 4, 3: 3}  # words in a block: consecutive repeats that are rejected
DEFAULT_BLOCK_REPEATS = 3  # for longer blocks
MAX_BLOCK_WORDS = 12
NGRAM_WORDS, MIN_NGRAM_COUNT = 4, 4  # an n-gram that occurs this often anywhere is rejected
MIN_SENTENCE_WORDS = 4  # a repeated sentence of at least so many words is rejected


class Problem(StrEnum):
    """Reasons why a caption is rejected. The values are stored in caption parts and must not change."""

    EMPTY = "empty"
    TRUNCATED = "cut"
    REFUSAL = "refusal"
    META_COMMENTARY = "narration"
    REPETITION = "repetition"
    NOT_PROSE = "no text"


def validate_answer(answer: str, *, truncated: bool) -> tuple[str, Problem | None]:
    """Return the caption in a model's answer, and its problem or None.

    `truncated` states that the answer reached the token limit: its unfinished last sentence is removed. Without any
    complete sentence, the caption is the entire answer and its problem is TRUNCATED, unless it has another one.
    """
    if len(answer) > MAX_CHARACTERS:
        return normalize(answer[:MAX_CHARACTERS]), find_problem(answer)
    text = normalize(answer)
    complete = complete_sentences(text) if truncated else text
    problem = find_problem(complete if truncated and complete else answer)
    return complete or text, problem or (Problem.TRUNCATED if truncated and not complete else None)


def find_problem(text: str) -> Problem | None:
    """Return the first problem of a raw text. Its line breaks matter, as Markdown lists are recognized by them."""
    if not any(character.isalnum() for character in text):
        return Problem.EMPTY
    if len(text) > MAX_CHARACTERS:
        return Problem.NOT_PROSE
    if not is_prose(text):
        return Problem.NOT_PROSE
    unquoted = remove_quotations(normalize(text))
    if is_refusal(unquoted):
        return Problem.REFUSAL
    if is_repetitive(unquoted):
        return Problem.REPETITION
    return Problem.META_COMMENTARY if is_meta_commentary(unquoted) else None


def remove_quotations(text: str) -> str:
    """Replace every quotation by a pair of empty ASCII quotation marks, in linear time."""
    text = ascii_punctuation(text)
    end = max((match.end() for match in CLOSING.finditer(text)), default=0)
    hidden = text[end:].replace("'", "\0")  # an opening mark that none closes would be searched for up to the end
    return QUOTED.sub("''", text[:end] + hidden).replace("\0", "'")


def is_prose(text: str) -> bool:
    """Return whether a text is mostly letters, without control characters, markup, JSON or chat-template tokens.

    Characters that override the direction of writing count as control characters.
    """
    categories = [unicodedata.category(character) for character in text if not character.isspace()]
    if (
        "\N{REPLACEMENT CHARACTER}" in text
        or DIRECTION.search(text)
        or any(category in ("Cc", "Cn", "Co", "Cs") for category in categories)
    ):
        return False
    if sum(category[0] in "LM" for category in categories) < MIN_LETTER_SHARE * len(categories):
        return False
    return not MARKUP.search(remove_quotations(text))


def is_refusal(text: str) -> bool:
    """Return whether a sentence is about the model, its limits or a missing image."""
    return any(REFUSAL.match(sentence) for sentence in split_sentences(text))


def is_meta_commentary(text: str) -> bool:
    """Return whether a text describes the image as an object ("The image shows") or addresses its viewer."""
    first, *later = split_sentences(text) or [""]
    return bool(META_FIRST.match(first) or META_ANYWHERE.search(text)) or any(
        META_LATER.match(sentence) for sentence in later
    )


def is_repetitive(text: str) -> bool:
    """Return whether a text repeats characters, words, n-grams or sentences."""
    if REPEATED_CHARACTER.search(text) or REPEATED_SUBSTRING.search(text):
        return True
    words = split_words(text)
    ngrams = Counter(tuple(words[start : start + NGRAM_WORDS]) for start in range(len(words) - NGRAM_WORDS + 1))
    sentences = Counter(tuple(split_words(sentence)) for sentence in split_sentences(text))
    if any(count > 1 and len(sentence) >= MIN_SENTENCE_WORDS for sentence, count in sentences.items()):
        return True
    return max(ngrams.values(), default=0) >= MIN_NGRAM_COUNT or has_repeated_block(words)


def has_repeated_block(words: list[str]) -> bool:
    """Return whether the same block of words occurs several times in succession."""
    for length in range(1, MAX_BLOCK_WORDS + 1):
        repeats = MIN_BLOCK_REPEATS.get(length, DEFAULT_BLOCK_REPEATS)
        matches = 0  # consecutive words that equal the word `length` positions before
        for position in range(length, len(words)):
            matches = matches + 1 if words[position] == words[position - length] else 0
            if matches >= length * (repeats - 1):
                return True
    return False
