"""`python -m conversion.to_bf16 CHECKPOINT`: turn an FP8 checkpoint back into a BF16 training checkpoint.

FP8 training keeps master weights, EMA and moments in float32, so the conversion only removes the plan and the scales.
It is exact.
"""

import sys
from pathlib import Path

from conversion.options import Parser, check_exists, check_output_apart
from pixart.terminal import printable


def restore(source: Path, output: Path, *, overwrite: bool = False) -> None:
    """Write the checkpoint `source` to `output` without its FP8 plan and scales.

    Raises ValueError, with nothing written, if `source` is not an FP8 checkpoint or `output` exists.
    """
    from pixart.checkpoint import directory as checkpoints  # imports torch, which takes seconds

    directory = checkpoints.find(source)
    checkpoint = checkpoints.load(directory)
    if checkpoint.plan is None:
        raise ValueError(f"{directory} is not an FP8 checkpoint; it already trains in BF16")
    if output.exists() and not (overwrite and (output / checkpoints.MARKER).exists()):
        raise ValueError(f"{output} exists; choose another --output, or give --overwrite to replace a checkpoint")
    check_output_apart(output, directory)
    checkpoint.plan, checkpoint.scales = None, {}
    checkpoints.save(checkpoint, output)


def make_parser() -> Parser:
    """Return the parser of the command line."""
    assert __doc__
    parser = Parser(prog="python -m conversion.to_bf16", description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="FP8 checkpoint directory, or run folder.")
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIRECTORY",
        help="Directory to write (default: the checkpoint's name with the suffix .bf16).",
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace the output of an earlier conversion.")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    source = options.checkpoint.absolute()
    output = options.output or source.with_name(f"{source.name.removesuffix('.fp8')}.bf16")
    try:
        check_exists(source)
        restore(source, output, overwrite=options.overwrite)
    except (ValueError, OSError) as error:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    print(f"written     {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
