"""A caption as a text: normalized, its sentences, and its short form."""

import re

SHORT_WORDS = 25  # a first sentence with more is shortened to its first clause

ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Mt|No|vs|approx|ca|cf|etc|e\.g|i\.e|a\.m|p\.m)|\b[A-Z])\.$")
SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)")
STRAIGHT = str.maketrans({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2013: "-", 0x2014: "-"})
# A comma begins a clause where one of these or a participle follows, not where a list of adjectives goes on.
CLAUSE_WORDS = (
    "with while as and or but which who whose where when set surrounded against under over above below behind beside "
    "between near next on in at by beneath along its his her their one another each both some"
)
CLAUSE = re.compile(rf"[;:]|\s-\s|,(?=\s(?:{'|'.join(CLAUSE_WORDS.split())}|\w+ing)\b)")


def straight(text: str) -> str:
    """Typographic quotation marks and dashes become those of a keyboard, one for one."""
    return text.translate(STRAIGHT)


def normalize(text: str) -> str:
    """Every run of white space becomes one space; quotation marks around the whole are taken off."""
    text = " ".join(text.split())
    return text[1:-1].strip() if re.fullmatch(r'"[^"]*"', straight(text)) else text


def sentences_of(text: str) -> list[str]:
    """Sentences of a normalized text; what follows the last full stop counts as one."""
    found, begin = [], 0
    for end in SENTENCE_END.finditer(straight(text)):
        if ABBREVIATION.search(text[begin : end.end()]) and end.end() < len(text):
            continue
        found.append(text[begin : end.end()].strip())
        begin = end.end()
    return [sentence for sentence in (*found, text[begin:].strip()) if sentence]


def whole_sentences(text: str) -> str:
    """Without what follows the last full stop; "" where there is none."""
    kept = sentences_of(text)
    if kept and not SENTENCE_END.search(straight(kept[-1])):
        kept.pop()
    return " ".join(kept)


def words_of(text: str) -> list[str]:
    """In lower case, without punctuation."""
    return re.findall(r"[^\W_]+(?:['-][^\W_]+)*", straight(text.lower()))


def short_form(text: str) -> str:
    """The first sentence; of a long one its first clause of three words or more, or else its first words."""
    first = next(iter(sentences_of(text)), "")
    if len(first.split()) <= SHORT_WORDS:
        return first
    clauses = [first[: match.start()] for match in CLAUSE.finditer(straight(first))]
    beginning = " ".join(first.split()[:SHORT_WORDS])
    fitting = [clause for clause in clauses if 3 <= len(clause.split()) <= SHORT_WORDS]
    if not fitting and "," in beginning[10:]:
        fitting = [beginning.rpartition(",")[0]]
    return (fitting[0] if fitting else beginning).rstrip(" ,;:") + "."
