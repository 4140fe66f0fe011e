"""Tables of Markdown, as GitHub and MkDocs read them."""

from collections.abc import Iterable, Sequence

SPECIAL = str.maketrans({"|": r"\|", "*": r"\*", "<": "&lt;"})


def escape(text: str) -> str:
    """Return a text for a cell of a table: one line, without characters of Markdown."""
    return " ".join(text.split()).translate(SPECIAL)


def code(text: str) -> str:
    """Return a text as code in a cell of a table; an empty text stays empty."""
    line = " ".join(text.split()).replace("|", r"\|")
    return f"`{line}`" if line else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
