import pytest

from pixart.data.captions.text import complete_sentences, normalize, shorten, split_sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  A dog \n runs.\tIt", "A dog runs. It"),
        ('"A dog runs."', "A dog runs."),
        ("“A dog runs.”", "A dog runs."),
        ('"Stop" and "Go" on two signs', '"Stop" and "Go" on two signs'),
        ('""', ""),
        (" \n", ""),
    ],
)
def test_normalize(text, expected):
    assert normalize(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog runs. It barks! Does it?", ["A dog runs.", "It barks!", "Does it?"]),
        ("A tower 3.5 m high. A car", ["A tower 3.5 m high.", "A car"]),
        ("A bust of Mr. Hyde in St. Paul's. It is white.", ["A bust of Mr. Hyde in St. Paul's.", "It is white."]),
        ("A book by J. R. Smith. It is red.", ["A book by J. R. Smith.", "It is red."]),
        ('A sign reads "Stop." A car waits.', ['A sign reads "Stop."', "A car waits."]),
        ("A dog...", ["A dog..."]),
        ("", []),
    ],
)
def test_split_sentences(text, expected):
    assert split_sentences(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog runs 3.5 m. It is", "A dog runs 3.5 m."),
        ("A dog runs.", "A dog runs."),
        ("A dog that runs", ""),
        ("A dog. A sign reads 'Go!' A", "A dog. A sign reads 'Go!'"),
    ],
)
def test_complete_sentences(text, expected):
    assert complete_sentences(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A dog on a red ball. Grass all around.", "A dog on a red ball."),
        (" A 2.5 m door! Is it open? ", "A 2.5 m door!"),
        ("no sentence at all", "no sentence at all"),
        ("a red circle on the left", "a red circle on the left"),
        (
            "A large, brown, wet dog, its ears up, runs along a wide white beach under dark clouds, with a red ball in "
            "its mouth and two gulls above, far away.",
            "A large, brown, wet dog.",
        ),
        (
            "A long row of narrow old houses with red roofs and green shutters beside a quiet canal in the late light; "
            "three boats lie in front of them on the water.",
            "A long row of narrow old houses with red roofs and green shutters beside a quiet canal in the late light.",
        ),
        (
            "A table set with a white cloth, silver forks, tall glasses, folded blue napkins, candles, small plates, "
            "bread baskets, pepper mills, jugs, olives and a bowl of lemons.",
            "A table set with a white cloth, silver forks, tall glasses, folded blue napkins, candles, small plates, "
            "bread baskets, pepper mills, jugs.",
        ),
        ("word " * 40, "word " * 24 + "word."),
        ("", ""),
    ],
)
def test_shorten(text, expected):
    assert shorten(normalize(text)) == expected
