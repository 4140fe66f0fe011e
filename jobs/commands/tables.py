"""Tables that commands print."""

from collections.abc import Sequence

MIN_WIDTH = 80


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows of texts in aligned columns below their header; one line for each row, also on a narrow terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in header:
        table.add_column(name, no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    width = sum(max(len(row[column]) for row in [header, *rows]) + 2 for column in range(len(header)))
    Console(highlight=False, width=max(MIN_WIDTH, width)).print(table)
