"""Text from data (names, captions, checkpoints, answers of servers) on its way to a terminal."""


def printable(text: object) -> str:
    """Return a text as one line in which every character that is not printable is escaped.

    Control characters could move the cursor, change earlier lines or forge new ones; invisible characters could reverse
    or hide text.
    """
    return "".join(letter if letter.isprintable() else escape(letter) for letter in str(text))


def escape(letter: str) -> str:
    """Return a character in Python's notation, such as the four characters of an escaped ESC."""
    return letter.encode("unicode_escape", "backslashreplace").decode("ascii")
