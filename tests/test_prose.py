"""Sentences of the README and of docs are short, and the output that the README shows is that of the demo."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
MAX_WORDS = 35


def sentences(markdown: str) -> list[str]:
    """Return the sentences of a page, without code blocks, images and tables."""
    text = re.sub(r"^```.*?^```$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    lines = [line for line in text.splitlines() if not line.startswith(("    ", "|", "!["))]
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", "\n".join(lines))
    blocks = re.split(r"\n\s*\n|\n(?=- |#|\d+\. )", text)
    return [sentence for block in blocks for sentence in re.split(r"(?<=[.!?:])\s+", " ".join(block.split()))]


def count_words(sentence: str) -> int:
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_sentences_are_short(page):
    texts = sentences(page.read_text())
    assert len(texts) > 2 or page.stem == "glossary"
    assert [sentence for sentence in texts if count_words(sentence) > MAX_WORDS] == []


def test_long_sentences_are_counted():
    text = f"# A page\n\nShort. {'word ' * 36}\nend.\n\n    {'code ' * 50}\n"
    assert [count_words(sentence) for sentence in sentences(text)] == [2, 1, 37]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@pytest.mark.slow
def test_the_readme_shows_the_output_of_the_demo(small_demo):
    lines = re.findall(r"^    ((?:sampled|accuracy|checkpoint): .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        pattern = re.sub(r"\d+", r"\\d+", re.escape(line)).replace("outputs", re.escape(str(small_demo.home)))
        pattern = pattern.replace("RUN", r"[\w-]+")
        assert re.search(f"^{pattern}$", small_demo.output, re.MULTILINE), line
