"""Hostile texts of a megabyte: every check of captions takes linear time."""

import time

import pytest

from pixart.data.captions.text import ascii_punctuation, normalize, split_words
from pixart.data.captions.validation import remove_quotations, validate_answer
from pixart.terminal import printable
from tests.attack.campaign import campaign

SIZE = 1_000_000
SECONDS = 1.0  # of processor time
UNITS = (
    *(
        "a",
        "a ",
        "word ",
        "a. ",
        "Mr. ",
        "é",
        "好",
        "e\u0301",
        "\u0301",
        "\u202e",
        "'a 'b",
        " 'a",
        "a'a'",
        "'",
        '"a',
        '"',
    ),
    *(
        "[",
        "[a](",
        "<",
        "<b>",
        "<|",
        '{"a":',
        "```",
        "**a** ",
        "- a\n",
        "1. ",
        "a\n",
        "\n",
        "\t",
        " ",
        "_",
        ":",
        ",",
        ".",
    ),
    *("Here is ", "the image the image ", "sure, ", "I ", "ab ", "abcabd", "a, b-c ", "&amp;", "\x00", "\x1b[2J", "“"),
)
CHECKS = (
    *(normalize, ascii_punctuation, split_words, remove_quotations, printable),
    *(lambda text, cut=cut: validate_answer(text, truncated=cut) for cut in (False, True)),
)


@pytest.mark.parametrize("at_limit", [False, True])
def test_a_megabyte_of_hostile_text_is_checked_within_a_second(record_property, at_limit):
    """So is a text just below the length up to which the patterns for sentences are tried."""
    attack = campaign(f"texts, {'at the limit' if at_limit else 'a megabyte'}", short=20, long=140)
    cases = [(unit, index) for unit in UNITS for index in range(len(CHECKS))]
    attack.generator.shuffle(cases)
    size = 20_000 if at_limit else SIZE
    for unit, index in cases[: attack.tries]:
        text = (unit * (size // len(unit) + 1))[:size]
        begun = time.process_time()
        attack.attempt(repr(unit), lambda text=text, index=index: CHECKS[index](text))
        if (seconds := time.process_time() - begun) > SECONDS:
            attack.wrong(repr(unit), f"check {index} took {seconds:.1f} s")
    attack.finish(record_property)
