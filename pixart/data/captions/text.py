"""Text processing of captions: normalization, sentence splitting and the short form."""

import re

MAX_SHORT_WORDS = 25  # a longer first sentence is shortened to its first clause

ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Mt|No|vs|approx|ca|cf|etc|e\.g|i\.e|a\.m|p\.m)|\b[A-Z])\.$")
MAX_ABBREVIATION = 12  # characters, one more than the longest and what is before it
SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)")
ASCII_PUNCTUATION = str.maketrans({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2013: "-", 0x2014: "-"})
# A comma separates clauses if one of these words or a participle follows; otherwise it may separate adjectives.
CLAUSE_WORDS = (
    "with while as and or but which who whose where when set surrounded against under over above below behind beside "
    "between near next on in at by beneath along its his her their one another each both some"
)
CLAUSE = re.compile(rf"[;:]|\s-\s|,(?=\s(?:{'|'.join(CLAUSE_WORDS.split())}|\w+ing)\b)")


def ascii_punctuation(text: str) -> str:
    """Replace typographic quotation marks and dashes by ASCII characters; the length does not change."""
    return text.translate(ASCII_PUNCTUATION)


def normalize(text: str) -> str:
    """Collapse whitespace and remove quotation marks that enclose the entire text."""
    text = " ".join(text.split())
    return text[1:-1].strip() if re.fullmatch(r'"[^"]*"', ascii_punctuation(text)) else text


def split_sentences(text: str) -> list[str]:
    """Split a normalized text into sentences; the last one may lack its full stop."""
    sentences, begin = [], 0
    for end in SENTENCE_END.finditer(ascii_punctuation(text)):
        last = text[max(begin, end.end() - MAX_ABBREVIATION) : end.end()]  # all of it would take quadratic time
        if ABBREVIATION.search(last) and end.end() < len(text):
            continue
        sentences.append(text[begin : end.end()].strip())
        begin = end.end()
    return [sentence for sentence in (*sentences, text[begin:].strip()) if sentence]


def complete_sentences(text: str) -> str:
    """Remove an unfinished last sentence from a text; return "" if there is no complete sentence."""
    sentences = split_sentences(text)
    if sentences and not SENTENCE_END.search(ascii_punctuation(sentences[-1])):
        sentences.pop()
    return " ".join(sentences)


def split_words(text: str) -> list[str]:
    """Split a text into lower-case words without punctuation."""
    return re.findall(r"[^\W_]+(?:['-][^\W_]+)*", ascii_punctuation(text.lower()))


def shorten(text: str) -> str:
    """Return the short form of a caption: its first sentence.

    A sentence of more than MAX_SHORT_WORDS words is cut to its first clause of three or more words or, failing that,
    to its first words.
    """
    first = next(iter(split_sentences(text)), "")
    if len(first.split()) <= MAX_SHORT_WORDS:
        return first
    clauses = [first[: match.start()] for match in CLAUSE.finditer(ascii_punctuation(first))]
    beginning = " ".join(first.split()[:MAX_SHORT_WORDS])
    fitting = [clause for clause in clauses if 3 <= len(clause.split()) <= MAX_SHORT_WORDS]
    if not fitting and "," in beginning[10:]:
        fitting = [beginning.rpartition(",")[0]]
    return (fitting[0] if fitting else beginning).rstrip(" ,;:") + "."
