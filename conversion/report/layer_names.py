"""Names of layers in the report, folded over blocks."""

import re
from collections.abc import Iterable

BLOCK = re.compile(r"dit_blocks\.(\d+)\.(.+)")


def block_and_kind(name: str) -> tuple[int, str]:
    """Split a linear's name into its block index and its name within the block."""
    match = BLOCK.fullmatch(name)
    return (int(match[1]), match[2]) if match else (0, name)


def fold_names(names: Iterable[str]) -> str:
    """Fold names that differ only by block into one, such as `dit_blocks.{0-2,5}.mlp.linear1`."""
    blocks: dict[str, list[int]] = {}
    for name in names:
        indices = blocks.setdefault(block_and_kind(name)[1], [])
        indices += [block_and_kind(name)[0]] if BLOCK.fullmatch(name) else []
    return ", ".join(
        f"dit_blocks.{{{format_ranges(indices)}}}.{kind}" if indices else kind for kind, indices in blocks.items()
    )


def format_ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
