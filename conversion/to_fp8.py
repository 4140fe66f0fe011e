"""`python -m conversion.to_fp8 CHECKPOINT`: convert a BF16 training checkpoint to FP8 with calibrated scales.

A stage-1 checkpoint is also re-parameterized as stage 2, unless `--stage 1` is given. The result is a checkpoint
directory that training continues from (weights, EMA, moments, FP8 plan and scales) with a report. Exit codes: 0 on
success, 2 for invalid input, with nothing written, and 3 if the result is written but fails its acceptance checks.

`torchrun --nproc-per-node N -m conversion.to_fp8 ...` divides the calibration batches among N ranks.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path

from conversion.options import Parser, add_options, check_exists, from_arguments
from pixart.terminal import printable


def make_parser() -> Parser:
    """Return the parser of the command line."""
    assert __doc__
    parser = Parser(prog="python -m conversion.to_fp8", description=__doc__.splitlines()[0])
    parser.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="Training checkpoint: .pt or safetensors file, checkpoint directory, run folder, or folder of Orbax.",
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIRECTORY",
        help="Directory to write (default: the checkpoint's name with the suffix .fp8).",
    )
    parser.add_argument("--dry-run", action="store_true", help="Print what would be done, and write nothing.")
    add_options(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    parsed = make_parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    is_reporting = os.environ.get("RANK", "0") == "0"
    try:
        options = from_arguments(parsed)
        check_exists(parsed.checkpoint)
        # These import torch, which takes seconds.
        from conversion.convert import convert, dry_run
        from conversion.report.text import describe
        from pixart.training.process_group import process_group

        with process_group() if "RANK" in os.environ else contextlib.nullcontext():
            if parsed.dry_run:
                print(dry_run(parsed.checkpoint, parsed.output, options))
                return 0
            report = convert(parsed.checkpoint, parsed.output, options)
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if is_reporting:
            print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    if not is_reporting:
        return 0
    print(describe(report))
    return 0 if report["acceptance"]["passed"] else 3


if __name__ == "__main__":
    sys.exit(main())
