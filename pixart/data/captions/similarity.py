"""How alike two sets of texts are: captions that a model was trained on, and requests that were rewritten for it."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pixart.data.captions.text import sentences_of
from pixart.data.captions.validation import Problem, problem

COMMON = 200  # content words whose overlap is measured
OPENINGS = 5
NARRATING = r"(there|here|it|he|she|they|we|you|i|this|that) (is|are|was|were|has|have|can|shows?|sees?)\b"
STOP = set(
    re.findall(
        r"\w+",
        "a an the and or of in on at by to with from for as is are was be it its this that these those their his her "
        "there into over under near behind beside between against above below one two",
    )
)


def describe(texts: Sequence[str]) -> dict[str, Any]:
    """Figures of one set; lengths are medians. Raises ValueError for an empty one."""
    if not texts:
        raise ValueError("there are no texts to describe")
    openings = Counter(" ".join(text.lower().split()[:2]) for text in texts)
    problems = Counter(found for text in texts if (found := problem(text)))
    first_sentences = [(sentences_of(text) or [""])[0] for text in texts]
    return {
        "texts": len(texts),
        "words": statistics.median(len(text.split()) for text in texts),
        "sentences": statistics.median(len(sentences_of(text)) for text in texts),
        "words of the first sentence": statistics.median(len(text.split()) for text in first_sentences),
        "opening with an article or a number": share(texts, r"(a|an|the|one|two|three|four|five|six|\d+)\b"),
        "more than three sentences": sum(len(sentences_of(text)) > 3 for text in texts) / len(texts),
        "opening with a verb, as in 'there is'": share(texts, NARRATING),
        **{f"with {what}": problems[what] / len(texts) for what in (Problem.REFUSAL, Problem.NARRATION)},
        "with any problem": sum(problems.values()) / len(texts),
        "commonest openings": [f"{words} {count / len(texts):.0%}" for words, count in openings.most_common(OPENINGS)],
    }


def share(texts: Sequence[str], opening: str) -> float:
    return sum(bool(re.match(opening, text.lower())) for text in texts) / len(texts)


def words_of(texts: Sequence[str]) -> Counter[str]:
    """Content words."""
    return Counter(word for text in texts for word in re.findall(r"[a-z][a-z'-]+", text.lower()) if word not in STOP)


def compare(captions: Sequence[str], rewritten: Sequence[str]) -> dict[str, Any]:
    """Both sets, and between them: the overlap (Jaccard) of the commonest words, and the divergence of all of them.

    The divergence is Jensen and Shannon's, 0 bits for the same frequencies and 1 bit for no word in common.
    """
    ours, theirs = words_of(captions), words_of(rewritten)
    common = [{word for word, _ in words.most_common(COMMON)} for words in (ours, theirs)]
    return {
        "captions": describe(captions),
        "rewritten": describe(rewritten),
        "overlap of common words": len(common[0] & common[1]) / max(1, len(common[0] | common[1])),
        "divergence of words, bits": divergence(ours, theirs),
    }


def divergence(one: Mapping[str, int], other: Mapping[str, int]) -> float:
    sums = [sum(one.values()) or 1, sum(other.values()) or 1]
    total = 0.0
    for word in {**one, **other}:
        shares = [words.get(word, 0) / size for words, size in zip((one, other), sums, strict=True)]
        middle = sum(shares) / 2
        total += sum(share / 2 * math.log2(share / middle) for share in shares if share)
    return total


def report(found: Mapping[str, Any]) -> str:
    """A table in Markdown."""
    rows = [
        f"| {name} | {shown(found['captions'][name])} | {shown(found['rewritten'][name])} |"
        for name in found["captions"]
    ]
    between = [f"{name}: {value:.3f}" for name, value in found.items() if isinstance(value, float)]
    return "\n".join(["| | captions | rewritten |", "|---|---|---|", *rows, "", *between])


def shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:.2f}" if isinstance(value, float) else str(value)
