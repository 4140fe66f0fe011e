"""Style statistics of captions, and the similarity of training captions and rewritten requests."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pixart.data.captions.text import split_sentences
from pixart.data.captions.validation import Problem, find_problem

NUM_COMMON_WORDS = 200  # content words whose overlap is measured
NUM_FIRST_WORDS = 5
CLAUSE_START = r"(there|here|it|he|she|they|we|you|i|this|that) (is|are|was|were|has|have|can|shows?|sees?)\b"
STOP_WORDS = set(
    re.findall(
        r"\w+",
        "a an the and or of in on at by to with from for as is are was be it its this that these those their his her "
        "there into over under near behind beside between against above below one two",
    )
)


def describe(texts: Sequence[str]) -> dict[str, Any]:
    """Return style statistics of a set of texts; lengths are medians. Raises ValueError if the set is empty."""
    if not texts:
        raise ValueError("there are no texts to describe")
    first_words = Counter(" ".join(text.lower().split()[:2]) for text in texts)
    problems = Counter(problem for text in texts if (problem := find_problem(text)))
    first_sentences = [(split_sentences(text) or [""])[0] for text in texts]
    return {
        "texts": len(texts),
        "words": statistics.median(len(text.split()) for text in texts),
        "sentences": statistics.median(len(split_sentences(text)) for text in texts),
        "words in the first sentence": statistics.median(len(text.split()) for text in first_sentences),
        "starts with an article or a number": share_matching(texts, r"(a|an|the|one|two|three|four|five|six|\d+)\b"),
        "more than three sentences": sum(len(split_sentences(text)) > 3 for text in texts) / len(texts),
        "starts with a clause such as 'there is'": share_matching(texts, CLAUSE_START),
        "with a refusal": problems[Problem.REFUSAL] / len(texts),
        "with meta-commentary": problems[Problem.META_COMMENTARY] / len(texts),
        "with any problem": sum(problems.values()) / len(texts),
        "most common first words": [
            f"{words} {count / len(texts):.0%}" for words, count in first_words.most_common(NUM_FIRST_WORDS)
        ],
    }


def share_matching(texts: Sequence[str], pattern: str) -> float:
    """Return the share of texts that start with a match of the pattern, ignoring case."""
    return sum(bool(re.match(pattern, text.lower())) for text in texts) / len(texts)


def count_content_words(texts: Sequence[str]) -> Counter[str]:
    words = (word for text in texts for word in re.findall(r"[a-z][a-z'-]+", text.lower()))
    return Counter(word for word in words if word not in STOP_WORDS)


def compare(captions: Sequence[str], rewritten: Sequence[str]) -> dict[str, Any]:
    """Compare training captions with rewritten requests.

    Returns the statistics of both sets, the Jaccard index of their most common content words, and the Jensen-Shannon
    divergence of their word frequencies: 0 bits for equal frequencies, 1 bit for disjoint vocabularies.
    """
    caption_words, rewritten_words = count_content_words(captions), count_content_words(rewritten)
    common = [{word for word, _ in words.most_common(NUM_COMMON_WORDS)} for words in (caption_words, rewritten_words)]
    return {
        "captions": describe(captions),
        "rewritten": describe(rewritten),
        "overlap of common words": len(common[0] & common[1]) / max(1, len(common[0] | common[1])),
        "divergence of words, bits": jensen_shannon_divergence(caption_words, rewritten_words),
    }


def jensen_shannon_divergence(p_counts: Mapping[str, int], q_counts: Mapping[str, int]) -> float:
    """Return the Jensen-Shannon divergence of two word distributions in bits (J. Lin, 1991)."""
    totals = [sum(p_counts.values()) or 1, sum(q_counts.values()) or 1]
    divergence = 0.0
    for word in {**p_counts, **q_counts}:
        shares = [counts.get(word, 0) / total for counts, total in zip((p_counts, q_counts), totals, strict=True)]
        mean = sum(shares) / 2
        divergence += sum(share / 2 * math.log2(share / mean) for share in shares if share)
    return divergence


def report(comparison: Mapping[str, Any]) -> str:
    """Format the result of `compare` as a Markdown table."""
    rows = [
        f"| {name} | {format_value(comparison['captions'][name])} | {format_value(comparison['rewritten'][name])} |"
        for name in comparison["captions"]
    ]
    similarities = [f"{name}: {value:.3f}" for name, value in comparison.items() if isinstance(value, float)]
    return "\n".join(["| | captions | rewritten |", "|---|---|---|", *rows, "", *similarities])


def format_value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(value)
    return f"{value:.2f}" if isinstance(value, float) else str(value)
