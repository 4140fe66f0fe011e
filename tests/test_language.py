"""Names and texts of the code use the field's terms, not words of the project's own.

The lists hold words that were replaced in the past, so that they do not come back; a word is added when it is replaced.
"""

import ast
import functools
import io
import re
import tokenize
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("jobs", "pixart", "conversion", "slurm", "tests", "benchmarks")
# Words that must not be part of an identifier.
WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        about accompanied asked behind bring brings companion each fate fates found gate gates how look own published
        quiet said silent spoken stand stands tell telling tells there told untold way ways what whatever where whoever
        whole
        """,
    )
)
# Identifiers that must not be defined.
NAMES = frozenset(
    re.findall(
        r"\w+",
        """
        GradientOf Gathering Quiet Watch affordable aside come_back decibels fine_weight_gradient forget_others held_out
        made_ahead of_first one_pass settle side_by_side there_and_back through_fp8 turned under_way
        """,
    )
)
# Identifiers that may contain these words, with the reason.
ALLOWED_NAMES = {
    "found_inf": "argument of torch's fused AdamW kernel",
    "for_each_shard": "the usual name of a function that calls another for every element",
}
# Phrases that must not occur in a string, a docstring or a comment.
PHRASES = re.compile(
    r"""
    \b(un)?told\b | \btells?\b | \baccompan(y|ies|ied)\b | \bcompanions?\b | \bspoken\b | \bfates?\b | \bsilent\b
    | \bgates?\b | \bwhoever\b | \bbrings?\b | \bunder\ way\b | \b(go(es)?|going)\ on\b | \bcomes\ to\ the\ same\b
    | \bheld[ -]out\b | \bof\ the\ average\b | \bthere\ (is|are|was|were)\ none\b | \bas\ it\ is[.,;)]
    | \bin\ one\ way\b | \bthe\ other\ way\b | (?<!decompression\ )\bbombs?\b
    """,
    re.IGNORECASE | re.VERBOSE,
)
# Texts in which a phrase may occur, with the reason.
ALLOWED_TEXTS = {
    "gate": "key of the acceptance checks in checkpoints of version 0.1",
    'checkpoints of an earlier version say "gate"': "names this key",
    "A dog. However, I cannot tell its breed.": "a caption that is rejected",
}
Entry = tuple[int, str]  # line, name or text


@functools.cache
def words(identifier: str) -> list[str]:
    """Return the words of an identifier in lower case, whether it is in snake case or in camel case."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", identifier)]


def defined_name(node: ast.AST) -> str | None:
    """Return the name of the function, class, argument, variable, attribute or alias that a node defines, if any."""
    match node:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return name
        case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
            return name
        case ast.ExceptHandler(name=name) | ast.alias(asname=name):
            return name
    return None


def names_and_texts(source: str) -> tuple[list[Entry], list[Entry]]:
    """Return the defined names of a module, and each line of its strings, docstrings and comments."""
    names: list[Entry] = []
    texts: list[Entry] = []
    for node in ast.walk(ast.parse(source)):
        if name := defined_name(node):
            names.append((node.lineno, name))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts += [(node.lineno + offset, line.strip()) for offset, line in enumerate(node.value.splitlines())]
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            texts.append((token.start[0], token.string.lstrip("# ")))
    return names, texts


def bad_names(source: str) -> list[Entry]:
    """Return the line and name of each identifier with a word of WORDS, or in NAMES."""
    return [entry for entry in names_and_texts(source)[0] if is_bad_name(entry[1])]


def bad_texts(source: str) -> list[Entry]:
    """Return the line and text of each occurrence of PHRASES."""
    return [entry for entry in names_and_texts(source)[1] if is_bad_text(entry[1])]


def is_bad_name(name: str) -> bool:
    return name not in ALLOWED_NAMES and (name in NAMES or not WORDS.isdisjoint(words(name)))


def is_bad_text(text: str) -> bool:
    return text not in ALLOWED_TEXTS and PHRASES.search(text) is not None


def files() -> list[Path]:
    """Return the Python files of the repository, except this one, which lists the words."""
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")) if path != Path(__file__)]


@pytest.fixture(scope="module")
def entries() -> tuple[dict[Path, list[Entry]], dict[Path, list[Entry]]]:
    """Names and texts of the repository by file."""
    both = {path: names_and_texts(path.read_text()) for path in files()}
    return {path: names for path, (names, _) in both.items()}, {path: texts for path, (_, texts) in both.items()}


def report(entries: dict[Path, list[Entry]], is_bad: Callable[[str], bool]) -> list[str]:
    """Return the place and text of each bad entry."""
    return [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path, lines in entries.items()
        for line, text in lines
        if is_bad(text)
    ]


def test_identifiers_have_no_private_words(entries):
    names, _ = entries
    assert len(names) > 300
    assert report(names, is_bad_name) == []


def test_module_names_have_no_private_words():
    assert [path for path in files() if is_bad_name(path.stem)] == []


def test_texts_have_no_private_phrases(entries):
    _, texts = entries
    assert report(texts, is_bad_text) == []


def test_documentation_has_no_private_phrases():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "benchmarks" / "README.md"]
    lines = {path: list(enumerate(path.read_text().splitlines(), 1)) for path in pages}
    assert report(lines, is_bad_text) == []


@pytest.mark.parametrize(
    "source",
    [
        "def tell_all(): ...",
        "def log(what): ...",
        "class WholeTable: ...",
        "found = 1",
        "for own in range(3): ...",
        "import numpy as there",
        "self.asked = 1",
        "def under_way(): ...",
        "try: ...\nexcept ValueError as told: ...",
    ],
)
def test_a_private_name_is_reported_by_line(source):
    assert bad_names(f"\n{source}")
    assert bad_texts(source) == []


@pytest.mark.parametrize(
    "source",
    ['"""Loss of rows held out."""', "x = f'{x} of the average'", "x = 1  # there is none", "'the user was told'"],
)
def test_a_private_phrase_is_reported_by_line(source):
    assert [line for line, _ in bad_texts(f"\n\n{source}")] == [3]
    assert bad_names(source) == []


def test_other_words_are_accepted():
    source = "class WaitingRequest: ...\nfound_inf = 'file not found; nothing is known about it'\nownership = 0\n"
    assert bad_names(source) == bad_texts(source) == []


def test_exceptions_are_used(entries):
    """Every allowed name and text occurs, so that the list of exceptions does not outlive its reasons."""
    for allowed, lines_by_file in zip((ALLOWED_NAMES, ALLOWED_TEXTS), entries, strict=True):
        assert allowed.keys() <= {text for lines in lines_by_file.values() for _, text in lines}
