"""`python -m conversion.to_bf16 CHECKPOINT`: an FP8 checkpoint goes on in BF16.

FP8 training keeps its master weights, average and moments in full precision, so all that is left out is the plan and
the scales: the way back is exact.
"""

import argparse
import sys
from pathlib import Path

from conversion.options import Parser, check_apart
from pixart.checkpoint import directory as checkpoints


def restore(source: Path, output: Path, *, overwrite: bool = False) -> None:
    """Raises ValueError, with nothing written, for what is no FP8 checkpoint or an output that exists."""
    directory = checkpoints.find(source)
    checkpoint = checkpoints.load(directory)
    if checkpoint.plan is None:
        raise ValueError(f"{directory} is no FP8 checkpoint")
    if output.exists() and not (overwrite and (output / checkpoints.MARKER).exists()):
        raise ValueError(f"{output} exists: name another --output, or give --overwrite")
    check_apart(output, directory)
    checkpoint.plan, checkpoint.scales = None, {}
    checkpoints.save(checkpoint, output)


def main(arguments: list[str] | None = None) -> int:
    assert __doc__
    parser: argparse.ArgumentParser = Parser(prog="python -m conversion.to_bf16", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="FP8 checkpoint directory or run folder")
    parser.add_argument("--output", type=Path, help="directory to write (default: beside it, with .bf16)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    options = parser.parse_args(arguments)
    source = options.checkpoint.absolute()
    output = options.output or source.with_name(f"{source.name.removesuffix('.fp8')}.bf16")
    try:
        if not source.exists():
            raise ValueError(f"{source}: no such file or directory")
        restore(source, output, overwrite=options.overwrite)
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"written     {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
